from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class CreateVideoRequest(_message.Message):
    __slots__ = ("video", "file", "finish")
    VIDEO_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    video: NewVideo
    file: FileChunk
    finish: bool
    def __init__(self, video: _Optional[_Union[NewVideo, _Mapping]] = ..., file: _Optional[_Union[FileChunk, _Mapping]] = ..., finish: _Optional[bool] = ...) -> None: ...

class NewVideo(_message.Message):
    __slots__ = ("idempotency_key", "prompt", "size", "steps", "seed", "text_guidance", "audio_guidance", "shift", "color_correction", "max_seconds", "scene_cuts", "webhook_url", "quality", "speakers", "input_reference", "audio", "audio_2")
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    TEXT_GUIDANCE_FIELD_NUMBER: _ClassVar[int]
    AUDIO_GUIDANCE_FIELD_NUMBER: _ClassVar[int]
    SHIFT_FIELD_NUMBER: _ClassVar[int]
    COLOR_CORRECTION_FIELD_NUMBER: _ClassVar[int]
    MAX_SECONDS_FIELD_NUMBER: _ClassVar[int]
    SCENE_CUTS_FIELD_NUMBER: _ClassVar[int]
    WEBHOOK_URL_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    SPEAKERS_FIELD_NUMBER: _ClassVar[int]
    INPUT_REFERENCE_FIELD_NUMBER: _ClassVar[int]
    AUDIO_FIELD_NUMBER: _ClassVar[int]
    AUDIO_2_FIELD_NUMBER: _ClassVar[int]
    idempotency_key: str
    prompt: str
    size: str
    steps: int
    seed: int
    text_guidance: float
    audio_guidance: float
    shift: float
    color_correction: float
    max_seconds: float
    scene_cuts: bool
    webhook_url: str
    quality: str
    speakers: Speakers
    input_reference: str
    audio: str
    audio_2: str
    def __init__(self, idempotency_key: _Optional[str] = ..., prompt: _Optional[str] = ..., size: _Optional[str] = ..., steps: _Optional[int] = ..., seed: _Optional[int] = ..., text_guidance: _Optional[float] = ..., audio_guidance: _Optional[float] = ..., shift: _Optional[float] = ..., color_correction: _Optional[float] = ..., max_seconds: _Optional[float] = ..., scene_cuts: _Optional[bool] = ..., webhook_url: _Optional[str] = ..., quality: _Optional[str] = ..., speakers: _Optional[_Union[Speakers, _Mapping]] = ..., input_reference: _Optional[str] = ..., audio: _Optional[str] = ..., audio_2: _Optional[str] = ...) -> None: ...

class Speakers(_message.Message):
    __slots__ = ("speakers", "order")
    class Order(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        TOGETHER: _ClassVar[Speakers.Order]
        IN_TURN: _ClassVar[Speakers.Order]
    TOGETHER: Speakers.Order
    IN_TURN: Speakers.Order
    class Box(_message.Message):
        __slots__ = ("left", "top", "right", "bottom")
        LEFT_FIELD_NUMBER: _ClassVar[int]
        TOP_FIELD_NUMBER: _ClassVar[int]
        RIGHT_FIELD_NUMBER: _ClassVar[int]
        BOTTOM_FIELD_NUMBER: _ClassVar[int]
        left: float
        top: float
        right: float
        bottom: float
        def __init__(self, left: _Optional[float] = ..., top: _Optional[float] = ..., right: _Optional[float] = ..., bottom: _Optional[float] = ...) -> None: ...
    class Speaker(_message.Message):
        __slots__ = ("box",)
        BOX_FIELD_NUMBER: _ClassVar[int]
        box: Speakers.Box
        def __init__(self, box: _Optional[_Union[Speakers.Box, _Mapping]] = ...) -> None: ...
    SPEAKERS_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    speakers: _containers.RepeatedCompositeFieldContainer[Speakers.Speaker]
    order: Speakers.Order
    def __init__(self, speakers: _Optional[_Iterable[_Union[Speakers.Speaker, _Mapping]]] = ..., order: _Optional[_Union[Speakers.Order, str]] = ...) -> None: ...

class FileChunk(_message.Message):
    __slots__ = ("name", "content")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    name: str
    content: bytes
    def __init__(self, name: _Optional[str] = ..., content: _Optional[bytes] = ...) -> None: ...

class GetVideoRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class ListVideosRequest(_message.Message):
    __slots__ = ("limit", "after", "order")
    class Order(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        NEWEST_FIRST: _ClassVar[ListVideosRequest.Order]
        OLDEST_FIRST: _ClassVar[ListVideosRequest.Order]
    NEWEST_FIRST: ListVideosRequest.Order
    OLDEST_FIRST: ListVideosRequest.Order
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    limit: int
    after: str
    order: ListVideosRequest.Order
    def __init__(self, limit: _Optional[int] = ..., after: _Optional[str] = ..., order: _Optional[_Union[ListVideosRequest.Order, str]] = ...) -> None: ...

class ListVideosResponse(_message.Message):
    __slots__ = ("videos", "has_more")
    VIDEOS_FIELD_NUMBER: _ClassVar[int]
    HAS_MORE_FIELD_NUMBER: _ClassVar[int]
    videos: _containers.RepeatedCompositeFieldContainer[Video]
    has_more: bool
    def __init__(self, videos: _Optional[_Iterable[_Union[Video, _Mapping]]] = ..., has_more: _Optional[bool] = ...) -> None: ...

class WatchVideoRequest(_message.Message):
    __slots__ = ("id", "clips_seen")
    ID_FIELD_NUMBER: _ClassVar[int]
    CLIPS_SEEN_FIELD_NUMBER: _ClassVar[int]
    id: str
    clips_seen: int
    def __init__(self, id: _Optional[str] = ..., clips_seen: _Optional[int] = ...) -> None: ...

class VideoEvent(_message.Message):
    __slots__ = ("progress", "clip", "ended", "deleted")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    CLIP_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    DELETED_FIELD_NUMBER: _ClassVar[int]
    progress: Video
    clip: FinishedClip
    ended: Video
    deleted: DeleteVideoResponse
    def __init__(self, progress: _Optional[_Union[Video, _Mapping]] = ..., clip: _Optional[_Union[FinishedClip, _Mapping]] = ..., ended: _Optional[_Union[Video, _Mapping]] = ..., deleted: _Optional[_Union[DeleteVideoResponse, _Mapping]] = ...) -> None: ...

class FinishedClip(_message.Message):
    __slots__ = ("clip", "frames", "finished_at")
    CLIP_FIELD_NUMBER: _ClassVar[int]
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    FINISHED_AT_FIELD_NUMBER: _ClassVar[int]
    clip: int
    frames: int
    finished_at: float
    def __init__(self, clip: _Optional[int] = ..., frames: _Optional[int] = ..., finished_at: _Optional[float] = ...) -> None: ...

class DownloadVideoRequest(_message.Message):
    __slots__ = ("id", "variant", "partial", "offset")
    class Variant(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        VIDEO: _ClassVar[DownloadVideoRequest.Variant]
        THUMBNAIL: _ClassVar[DownloadVideoRequest.Variant]
    VIDEO: DownloadVideoRequest.Variant
    THUMBNAIL: DownloadVideoRequest.Variant
    ID_FIELD_NUMBER: _ClassVar[int]
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    PARTIAL_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    id: str
    variant: DownloadVideoRequest.Variant
    partial: bool
    offset: int
    def __init__(self, id: _Optional[str] = ..., variant: _Optional[_Union[DownloadVideoRequest.Variant, str]] = ..., partial: _Optional[bool] = ..., offset: _Optional[int] = ...) -> None: ...

class VideoContent(_message.Message):
    __slots__ = ("content", "offset", "size")
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    content: bytes
    offset: int
    size: int
    def __init__(self, content: _Optional[bytes] = ..., offset: _Optional[int] = ..., size: _Optional[int] = ...) -> None: ...

class CancelVideoRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class DeleteVideoRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class DeleteVideoResponse(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class Video(_message.Message):
    __slots__ = ("id", "status", "progress", "created_at", "started_at", "completed_at", "expires_at", "prompt", "size", "seconds", "seed", "stage", "queue_position", "clip", "clips", "step", "steps", "eta_seconds", "error")
    class Status(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STATUS_UNSPECIFIED: _ClassVar[Video.Status]
        QUEUED: _ClassVar[Video.Status]
        IN_PROGRESS: _ClassVar[Video.Status]
        COMPLETED: _ClassVar[Video.Status]
        FAILED: _ClassVar[Video.Status]
        CANCELLED: _ClassVar[Video.Status]
    STATUS_UNSPECIFIED: Video.Status
    QUEUED: Video.Status
    IN_PROGRESS: Video.Status
    COMPLETED: Video.Status
    FAILED: Video.Status
    CANCELLED: Video.Status
    ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_FIELD_NUMBER: _ClassVar[int]
    COMPLETED_AT_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    QUEUE_POSITION_FIELD_NUMBER: _ClassVar[int]
    CLIP_FIELD_NUMBER: _ClassVar[int]
    CLIPS_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    ETA_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    id: str
    status: Video.Status
    progress: int
    created_at: int
    started_at: int
    completed_at: int
    expires_at: int
    prompt: str
    size: str
    seconds: float
    seed: int
    stage: str
    queue_position: int
    clip: int
    clips: int
    step: int
    steps: int
    eta_seconds: float
    error: VideoError
    def __init__(self, id: _Optional[str] = ..., status: _Optional[_Union[Video.Status, str]] = ..., progress: _Optional[int] = ..., created_at: _Optional[int] = ..., started_at: _Optional[int] = ..., completed_at: _Optional[int] = ..., expires_at: _Optional[int] = ..., prompt: _Optional[str] = ..., size: _Optional[str] = ..., seconds: _Optional[float] = ..., seed: _Optional[int] = ..., stage: _Optional[str] = ..., queue_position: _Optional[int] = ..., clip: _Optional[int] = ..., clips: _Optional[int] = ..., step: _Optional[int] = ..., steps: _Optional[int] = ..., eta_seconds: _Optional[float] = ..., error: _Optional[_Union[VideoError, _Mapping]] = ...) -> None: ...

class VideoError(_message.Message):
    __slots__ = ("type", "code", "message", "param")
    TYPE_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    PARAM_FIELD_NUMBER: _ClassVar[int]
    type: str
    code: str
    message: str
    param: str
    def __init__(self, type: _Optional[str] = ..., code: _Optional[str] = ..., message: _Optional[str] = ..., param: _Optional[str] = ...) -> None: ...
