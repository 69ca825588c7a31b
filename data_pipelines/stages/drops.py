"""What a build tells afterwards: report.jsonl (every dropped file), report.json and a summary."""

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipelines.samples import REASONS, Dropped
from data_pipelines.write import write_json

EXAMPLES = 5


def write_dropped(directory: Path, dropped: list[Dropped]) -> None:
    """Lists every dropped file in report.jsonl: {"file", "reason", "detail"}."""
    path = directory / "report.jsonl"
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        for name, reason, detail in dropped:
            file.write(json.dumps({"file": name, "reason": reason, "detail": detail}) + "\n")
    os.replace(partial, path)


def write_report(
    directory: Path, kept: Mapping[str, int], dropped: list[Dropped], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes report.json and report.jsonl.

    Args:
      kept: split -> records.
      facts: whatever else is worth keeping.

    Returns:
      The content of report.json.
    """
    reasons = {}
    for reason, meaning in REASONS.items():
        cases = [case for case in dropped if case.reason == reason]
        if cases:
            examples = [{"file": case.name, "detail": case.detail} for case in cases[:EXAMPLES]]
            reasons[reason] = {"count": len(cases), "meaning": meaning, "examples": examples}
    report = {"kept": dict(kept), "dropped": reasons, **facts}
    write_dropped(directory, dropped)
    write_json(directory / "report.json", report)
    return report


def counts(dropped: list[Dropped]) -> str:
    """ "corrupt 3, no_caption 9", the most frequent first."""
    found = Counter(case.reason for case in dropped)
    return ", ".join(f"{reason} {count:,}" for reason, count in found.most_common())


def summary(report: Mapping[str, Any]) -> str:
    """The report for a person, a few lines."""
    kept = ", ".join(f"{count:,} {split}" for split, count in report["kept"].items())
    lines = [f"kept     {kept}"]
    for reason, entry in report["dropped"].items():
        lines.append(f"dropped  {entry['count']:,} {reason}: {entry['meaning']}")
        lines += [
            f"           {_printable(case['file'])}  ({_printable(case['detail'])})"
            for case in entry["examples"]
        ]
        if entry["count"] > len(entry["examples"]):
            lines.append("           ... all of them in report.jsonl")
    if len(report["buckets"]) > 1:
        lines.append("buckets, height x width")
        lines += [f"{count:>14,} {size}" for size, count in report["buckets"].items()]
    captions = report["captions"]
    lines.append(f"captions {captions['total']:,}, {captions['unique']:,} of them different")
    for name, count in captions["truncated"].items():
        if count:
            lines.append(
                f"         {count:,} are longer than the {captions['length'][name]} tokens of "
                f"{name} and were cut (--text_length)"
            )
    if report["enlarged"]:
        lines.append(f"enlarged {report['enlarged']:,} pictures smaller than the resolution")
    if report["exact_duplicates"]:
        copies = report["exact_duplicates"]
        lines.append(f"copies   {copies:,} files equal another one and were kept (--deduplicate)")
    return "\n".join(lines)


def _printable(text: str) -> str:
    # A file name may hold any bytes, and those must not steer the terminal.
    return text if text.isprintable() else ascii(text)
