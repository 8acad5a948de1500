"""InfiniteTalk: a picture and a voice become a talking video. The model, and nothing else.

Start at `infinitetalk.pipeline`. Nothing is imported here, so that whoever needs only the errors or the arithmetic does
not wait for torch.
"""

import logging

# diffusers imports torchao, and both say at length what they lack of what is not used here.
for _name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
    logging.getLogger(_name).setLevel(logging.ERROR)
