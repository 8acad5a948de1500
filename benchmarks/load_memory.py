"""How much memory does loading take? Peak resident memory against the size of the loaded model.

    python benchmarks/load_memory.py [--folder DIR]

Writes a synthetic Wan2.1 snapshot of several GB (float32 transformer shards, a bfloat16 T5) in the published layout,
then loads each part as bfloat16 in a process of its own: with our loader, and by reading every file into a dictionary
first, as loaders commonly do. The bound is what we promise: the loaded bytes, plus the largest tensor, plus 10 %.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from infinitetalk import checkpoints
from scripts import make_tiny_snapshots as snapshots

CPU = torch.device("cpu")
GB = 1e9


def write_snapshot(folder: Path) -> None:
    """1.6 billion transformer parameters and a T5 of 0.6 billion, each much like the published ones in proportion."""
    snapshots.DIM, snapshots.HEADS, snapshots.FFN_DIM, snapshots.LAYERS = 1536, 12, 8960, 30
    snapshots.AUDIO_HIDDEN, snapshots.AUDIO_DIM, snapshots.SPEECH_DIM = 512, 768, 768
    snapshots.TEXT_DIM, snapshots.TEXT_HEADS, snapshots.TEXT_FFN_DIM = 1024, 16, 2816
    snapshots.TEXT_LAYERS, snapshots.TEXT_VOCABULARY = 24, 256384
    snapshots.draw = draw_fast
    snapshots.write_wan(folder, seed=0)
    save_file(draw_fast(0, "", snapshots.audio_layout()), folder / "infinitetalk.safetensors")


def draw_fast(
    seed: int, file: str, layout: snapshots.Layout, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    return {name: torch.full(shape, 0.01, dtype=dtype) for name, shape in layout.items()}


def load(part: str, loader: str, folder: Path) -> None:
    """Run in a process of its own: prints loaded bytes, largest tensor, peak growth of resident memory, seconds."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far, which includes the parent's before exec
    before, started = peak_resident_bytes(), time.monotonic()
    held: dict[str, torch.Tensor] = {}
    if loader == "ours":
        model = (
            checkpoints.load_transformer(folder, folder / "infinitetalk.safetensors", CPU, torch.bfloat16)
            if part == "transformer"
            else checkpoints.load_text_encoder(folder, CPU, torch.bfloat16)
        )
        held = dict(model.named_parameters())
    elif part == "transformer":
        for file in sorted(folder.glob("*.safetensors")):
            held |= load_file(file)
        held = {name: tensor.to(torch.bfloat16) for name, tensor in held.items()}
    else:
        stored = torch.load(folder / checkpoints.T5_FILE, weights_only=True)
        held = {name: tensor.to(torch.bfloat16, copy=True) for name, tensor in stored.items()}
    peak = peak_resident_bytes() - before
    sizes = [tensor.nbytes for tensor in held.values()]
    print(sum(sizes), max(sizes), peak, time.monotonic() - started)


def peak_resident_bytes() -> int:
    """Linux only: the most memory this process ever had resident, mapped pages of files included."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) * 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, help="where to write about 9 GB for the time being (the temporary folder)"
    )
    parser.add_argument("--load", nargs=3, metavar=("PART", "LOADER", "SNAPSHOT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        load(options.load[0], options.load[1], Path(options.load[2]))
        return 0

    table = Table("part", "loader", "loaded GB", "peak GB", "bound GB", "ratio", "seconds")
    kept = True
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, Console().status("Writing a synthetic snapshot"):
        write_snapshot(Path(folder))
        for part in ("transformer", "T5"):
            for loader in ("ours", "dictionary"):
                command = [sys.executable, __file__, "--load", part, loader, folder]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                loaded, largest, peak, seconds = map(float, output.split())
                bound = 1.1 * loaded + largest
                kept &= loader != "ours" or peak <= bound
                figures = (f"{value / GB:.2f}" for value in (loaded, peak, bound))
                table.add_row(part, loader, *figures, f"{peak / loaded:.2f}", f"{seconds:.1f}")
    Console().print(table)
    print("the bound holds" if kept else "THE BOUND IS BROKEN")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
