"""InfiniteTalk: a picture and a voice become a talking video. The model, and nothing else."""

from infinitetalk.errors import CheckpointError, InputError
from infinitetalk.pipeline import Clip, ClipState, InfiniteTalkPipeline, Settings, Speaker, Step

__all__ = ["CheckpointError", "Clip", "ClipState", "InfiniteTalkPipeline", "InputError", "Settings", "Speaker", "Step"]
