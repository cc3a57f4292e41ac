"""Write the tables between `<!-- table: FILE -->` and `<!-- end -->` anew from the CSV files in docs/results.

    python docs/update.py            # rewrite README.md and docs/*.md
    python docs/update.py --check    # say what would change, exit 1 if anything would

The CSV files are the `table.csv` of a report; the command that made each stands beside its table.
"""

import csv
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MARKERS = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(path: Path) -> str:
    """A Markdown table of a report's CSV: decoders in order, then baselines."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["state"] == "done"]
    nets = sorted({row["lpips_net"] for row in rows} - {""})
    head = [
        "features",
        "shape",
        "decoder",
        "parameters",
        "training",
        "PSNR (dB)",
        "SSIM",
        f"LPIPS ({', '.join(nets)})",
    ]
    lines = [head, ["---", "---", "---", *["---:"] * 5]]
    for row in rows:
        source = row["sources"] or row["label"]
        if row["fusion"]:
            source += f", {row['fusion']}"
        if row["weights"] == "random":
            source += " **RANDOM WEIGHTS**"
        size = f"{int(row['parameters']):,}" if row["kind"] == "decoder" else ""
        trained = f"{float(row['train_seconds']):,.0f} s" if row["kind"] == "decoder" else ""
        scores = [spread(row, "psnr", 2), spread(row, "ssim", 3), spread(row, "lpips", 3)]
        lines.append([source, row["shapes"], row["decoder"], size, trained, *scores])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def spread(row: dict, name: str, digits: int) -> str:
    if not row[f"{name}_mean"]:
        return "unavailable"
    mean, deviation = float(row[f"{name}_mean"]), row[f"{name}_std"]
    return f"{mean:.{digits}f}" + (f" ± {float(deviation):.{digits}f}" if deviation else "")


def updated(text: str) -> str:
    return MARKERS.sub(lambda match: match[1] + table(ROOT / match[2]) + match[3], text)


def main(arguments: list[str]) -> int:
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        before = path.read_text(encoding="utf-8")
        after = updated(before)
        if after != before:
            stale.append(path.name)
            if "--check" not in arguments:
                path.write_text(after, encoding="utf-8")
    if stale:
        print(f"{'out of date' if '--check' in arguments else 'updated'}: {', '.join(stale)}")
    return int("--check" in arguments and bool(stale))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
