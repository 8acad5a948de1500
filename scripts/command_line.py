"""What the two commands share: the input file, what a video is made of, and making it with a progress bar.

`generate.py` has flags of our own, `generate_infinitetalk.py` those of the published model. Everything that can be
wrong with the input is found out before the models are loaded, which takes minutes. torch is imported late, so that
`--help` and most mistakes are answered at once.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as EtaColumn
from rich.text import Text

from infinitetalk.errors import CheckpointError, InputError, RankError
from infinitetalk.geometry import Box, output_size, speaker_regions
from infinitetalk.settings import Settings
from infinitetalk.timeline import FRAMES_PER_SECOND, plan

if TYPE_CHECKING:
    from infinitetalk.pipeline import InfiniteTalkPipeline, Step
    from infinitetalk.quantization import Quantization

AUDIO_ORDERS: dict[str, Literal["together", "in_turn"]] = {"para": "together", "add": "in_turn"}
"""The input file's audio_type → ours."""
KEYS = {"prompt", "cond_video", "cond_audio", "audio_type", "bbox"}
PEOPLE = ("person1", "person2")
NOBODY = "None"
"""The input file's word, beside null, for the voice of someone who stays silent."""


class PixelBox(NamedTuple):
    """Where someone is, as the input file has it: pixels of the source picture, rows first; the last two exclusive."""

    first_row: int
    first_column: int
    last_row: int
    last_column: int

    def fractions(self, height: int, width: int) -> Box:
        """Raises InputError for a box that is not in a picture of that many pixels."""
        if not (0 <= self.first_row < self.last_row <= height and 0 <= self.first_column < self.last_column <= width):
            order = "[first row, first column, last row, last column]"
            problem = f"is not {order} in pixels of the picture, which has {height} rows and {width} columns"
            raise InputError("bbox", f"bbox {list(self)} {problem}.")
        return self.first_column / width, self.first_row / height, self.last_column / width, self.last_row / height


class InputFile(NamedTuple):
    """The published model's input file, as far as it says something."""

    prompt: str | None = None
    picture: Path | None = None
    voices: Mapping[str, Path | None] = {}
    """By "person1" and "person2"; None for someone who stays silent."""
    boxes: Mapping[str, Box | PixelBox] = {}
    audio_order: Literal["together", "in_turn"] | None = None
    not_used: Sequence[str] = ()
    """Keys that mean nothing here."""


@dataclass(frozen=True)
class Person:
    """One of the speakers."""

    voice: Path | None
    """None for someone who stays silent."""
    box: Box | PixelBox | None = None
    """None: their half of the picture, the first speaker's on the left."""


@dataclass(frozen=True)
class Cast:
    """What a video is made of."""

    prompt: str
    picture: Path
    """Or a video to dub."""
    speakers: tuple[Person, ...]
    """One or two. If none of them has a voice, the first has the video's own sound."""

    @classmethod
    def of(cls, given: InputFile, remedy: str) -> Self:
        """remedy: what to do about a missing "{name}", the input file's "{key}". Raises InputError."""
        if given.picture is None or given.prompt is None:
            name, key = ("picture", "cond_video") if given.picture is None else ("prompt", "prompt")
            raise InputError(name, f"no {name} was given; {remedy.format(name=name, key=key)}.", "missing")
        named = given.voices.keys() | given.boxes.keys()
        people = PEOPLE if PEOPLE[1] in named else PEOPLE[:1]
        speakers = tuple(Person(given.voices.get(person), given.boxes.get(person)) for person in people)
        return cls(given.prompt, given.picture, speakers)


@dataclass(frozen=True)
class Models:
    """What is loaded, and how."""

    wan: Path
    infinitetalk: Path
    wav2vec2: Path
    device: str | None = None
    loras: tuple[tuple[Path, float], ...] = ()
    """Each with its scale."""
    quantization: "Quantization | None" = None
    memory: str | None = None
    """One of infinitetalk.memory's presets; None: that for the GPU."""
    reference_quirks: bool = False

    def load(self, device: str | None) -> "InfiniteTalkPipeline":
        """Raises CheckpointError, and InputError for a device or a preset that is not there."""
        from infinitetalk.lora import read_lora
        from infinitetalk.pipeline import InfiniteTalkPipeline

        loras = [(read_lora(path, self.reference_quirks), scale) for path, scale in self.loras]
        return InfiniteTalkPipeline.from_snapshots(
            self.wan, self.infinitetalk, self.wav2vec2, device, self.memory, self.quantization, loras
        )


class RateColumn(TextColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{1 / task.speed:.1f} s/step" if task.speed else "")


def read_input_file(path: Path) -> InputFile:
    """Raises InputError for what is no such file, or names files that are not there."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError("input", f"{path} is not a JSON input file: {error}") from error
    if not isinstance(content, dict):
        raise InputError("input", f"{path} is not a JSON input file: it holds no object {{…}}.")

    def entry(name: str, kind: type, wanted: str) -> Any:
        value = content.get(name)
        if value is not None and not isinstance(value, kind):
            raise InputError(name, f"{path}: {name} is {value!r}; it must be {wanted}.")
        return value

    def people(name: str, wanted: str) -> dict[str, Any]:
        values: dict[str, Any] = entry(name, dict, wanted) or {}
        if strangers := values.keys() - set(PEOPLE):
            raise InputError(name, f"{path}: {name} names {min(strangers)!r}; the two speakers are {PEOPLE}.")
        return values

    def file(name: str, value: object) -> Path:
        if not isinstance(value, str):
            raise InputError(name, f"{path}: {name} is {value!r}; it must be the name of a file.")
        places = [Path.cwd() / value, path.absolute().parent / value]
        for place in places:
            if place.is_file():
                return place
        tried = " nor ".join(dict.fromkeys(map(str, places)))
        message = f"names {value!r}, relative to the current folder or to its own, and there is neither {tried}"
        raise InputError(name, f"{path}: {name} {message}.", "not_found")

    def box(name: str, value: object) -> PixelBox:
        if isinstance(value, list) and len(value) == 4 and all(type(side) is int for side in value):
            return PixelBox(*value)
        wanted = "[first row, first column, last row, last column] in whole pixels of the picture"
        raise InputError("bbox", f"{path}: bbox of {name} is {value!r}; it must be {wanted}.")

    voices = people("cond_audio", "an object of one voice or two, such as {'person1': FILE, 'person2': FILE}")
    boxes = people("bbox", "an object of two boxes, such as {'person1': [20, 30, 440, 418], 'person2': …}")
    audio_type, picture = entry("audio_type", str, "'para' or 'add'"), content.get("cond_video")
    if audio_type is not None and audio_type not in AUDIO_ORDERS:
        meaning = "'para' (they speak at the same time) or 'add' (the second speaks after the first)"
        raise InputError("audio_type", f"{path}: audio_type is {audio_type!r}; it must be {meaning}.")
    return InputFile(
        prompt=entry("prompt", str, "a text"),
        picture=None if picture is None else file("cond_video", picture),
        voices={name: None if value in (None, NOBODY) else file(name, value) for name, value in voices.items()},
        boxes={name: box(name, value) for name, value in boxes.items()},
        audio_order=None if audio_type is None else AUDIO_ORDERS[audio_type],
        not_used=sorted(content.keys() - KEYS),
    )


def make_video(
    cast: Cast,
    settings: Settings,
    models: Models,
    output: Path,
    console: Console,
    *,
    find_scenes: bool,
    if_cut: str | None = None,
) -> None:
    """Write the video.

    find_scenes: generate each scene of a video on its own; if_cut: what to say if the video is to end before its voice.
    Of torchrun's processes the first does that, and the others compute for it. Raises InputError, CheckpointError,
    RankError, and OSError for an output that cannot be written.
    """
    with console.status("Starting"):
        from avatar_api.footage import Footage, read_reference, scene_starts
        from avatar_api.media import read_voice
        from avatar_api.video_writer import VideoWriter
        from infinitetalk.audio import arrange, frame_count
        from infinitetalk.parallel import Leader, device_of, follow, torchrun_rank
        from infinitetalk.pipeline import Speaker

    rank = torchrun_rank()
    if rank:  # rank 0 makes the video
        follow(models.load, device_of(rank, models.device))
        return

    with ExitStack() as opened:
        reference = read_reference(cast.picture, "picture")
        if isinstance(reference, Footage):
            opened.enter_context(reference)
            source = reference.height, reference.width
        else:
            source = reference.shape[0], reference.shape[1]
        height, width = output_size(settings.size, *source)

        people = list(cast.speakers)
        if all(person.voice is None for person in people):
            if not isinstance(reference, Footage):
                raise InputError("voice", "no voice was given, and a picture has none of its own.", "missing")
            people[0] = replace(people[0], voice=cast.picture)
        boxes = [person.box.fractions(*source) if isinstance(person.box, PixelBox) else person.box for person in people]
        if len(people) == 2:
            speaker_regions(boxes, source, (height, width))
        elif boxes != [None]:
            raise InputError("speakers", "a box was given for the only speaker; boxes tell two speakers apart.")
        voices = [
            None if person.voice is None else read_voice(person.voice, "voice" if number == 1 else f"voice_{number}")
            for number, person in enumerate(people, 1)
        ]
        heard = frame_count(len(arrange(voices, settings.audio_order)[0]))
        clips = settings.frames_per_clip, settings.motion_frames, settings.max_frames, settings.reference_quirks
        shown = plan([heard], *clips).total_frames
        if shown < heard and if_cut:
            ends = f"The video ends after {_seconds(shown)}, the voice after {_seconds(heard)}"
            console.print(f"{ends}: {if_cut}", soft_wrap=True)
        starts = [0]
        if find_scenes and isinstance(reference, Footage):
            with console.status("Looking for cuts"):
                starts = scene_starts(reference, shown)
            console.print(f"Scenes begin at {', '.join(map(_seconds, starts))}", soft_wrap=True)

        with console.status("Loading the models"):
            leader = None if rank is None else Leader()
            pipeline = models.load(models.device)
            if leader is not None:
                opened.callback(leader.close)
                leader.wait()
                pipeline.ranks = leader
        console.print(f"Models loaded on {pipeline.device} from {models.wan.parent}", soft_wrap=True)
        console.print(pipeline.memory, soft_wrap=True, highlight=False)
        speakers = [Speaker(voice, box) for voice, box in zip(voices, boxes, strict=True)]
        sounds = [person.voice for person in people]
        with _progress(console) as on_step:
            output.parent.mkdir(parents=True, exist_ok=True)
            with VideoWriter(output, width, height, sounds, settings.audio_order) as writer:
                for clip in pipeline.generate(
                    reference, speakers, cast.prompt, settings, scene_starts=starts, on_step=on_step
                ):
                    writer.write(clip.frames)
    console.print(f"{output}: {width}x{height}, {writer.frames} frames, {_seconds(writer.frames)}", soft_wrap=True)


def _seconds(frames: int) -> str:
    return f"{frames / FRAMES_PER_SECOND:.2f} s"


@contextmanager
def _progress(console: Console) -> "Iterator[Callable[[Step], None]]":
    """A progress bar, and what moves it after each step."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        RateColumn(""),
        TimeElapsedColumn(),
        TextColumn("left"),
        EtaColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("Preparing", total=None)

        def on_step(step: "Step") -> None:
            progress.update(
                task,
                description=f"Clip {step.clip + 1} of {step.clips}, step",
                completed=step.clip * step.steps + step.step + 1,
                total=step.clips * step.steps,
            )

        yield on_step


def exit_status(run: Callable[[Console], None], flags: Mapping[str, str] = {}) -> int:
    """Run a command; what goes wrong is said in one line. flags: the flag of an input, where it has another name."""
    console = Console(quiet=os.environ.get("LOCAL_RANK", "0") != "0")  # of torchrun's processes, one speaks
    errors = Console(stderr=True, quiet=console.quiet, soft_wrap=True, highlight=False, markup=False)
    try:
        run(console)
    except (InputError, CheckpointError) as error:
        flag = flags.get(error.param) if isinstance(error, InputError) else None
        errors.print(f"error: {flag}: {error}" if flag else f"error: {error}")
        return 2
    except (OSError, RankError) as error:
        errors.print(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        errors.print("stopped; no video was written")
        return 130
    return 0
