"""InfiniteTalk: a picture and a voice become a talking video. The model, and nothing else.

Start at `infinitetalk.pipeline`. Nothing is imported here, so that whoever needs only the errors or the arithmetic does
not wait for torch.
"""
