"""Tables in Markdown, for docs/PERFORMANCE.md: each line is printed when it is known."""


def table(*head: str) -> None:
    print(f"\n| {' | '.join(head)} |\n{'|---' * len(head)}|", flush=True)


def row(*cells: object) -> None:
    texts = (
        f"{cell:.3g}"
        if isinstance(cell, float) and abs(cell) < 100
        else f"{cell:.0f}"
        if isinstance(cell, float)
        else str(cell)
        for cell in cells
    )
    print(f"| {' | '.join(texts)} |", flush=True)
