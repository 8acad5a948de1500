"""InfiniteTalk: a picture and a voice become a talking video. The model, and nothing else.

Start at `infinitetalk.pipeline`. Nothing is imported here, so that whoever needs only the errors or the arithmetic does
not wait for torch.
"""

import logging
import os

# Before torch makes its GPU allocator: with segments that grow, what one part frees serves the next. Without them the
# preset for 24 GB runs out at 720p with 7 GB free in pieces. Who has set something of their own keeps it.
if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"

# diffusers imports torchao, and both say at length what they lack of what is not used here.
for _name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
    logging.getLogger(_name).setLevel(logging.ERROR)
