"""What a Hugging Face folder holds beside its weights, and what of it a converted folder gets: copied byte for byte,
never saved anew, since what one version of transformers writes another may not read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megadpo.convert.config_json import read_json
from megadpo.errors import ModelError

COPIED = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model*", "spiece.model"),
    *("*.tiktoken", "tekken.json", "chat_template.*", "additional_chat_templates/*.jinja"),
    *("LICENSE*", "NOTICE*", "USE_POLICY*"),
)


def small_files(folder: str | Path) -> dict[str, Path]:
    """Files to copy by their name in the new folder, sorted; config.json, weights and README are not among them.

    Python files are copied where an auto_map of config.json or tokenizer_config.json names them, so that what refers
    to them still finds them; megadpo never runs them. ModelError for a link that leads out of the folder.
    """
    folder = Path(folder).expanduser()
    patterns = (*COPIED, *sorted(_custom_code(folder)))
    found = {str(file.relative_to(folder)): file for pattern in patterns for file in folder.glob(pattern)}
    files = {name: file for name, file in sorted(found.items()) if file.is_file()}
    for file in files.values():
        _refuse_link_out(folder, file)
    return files


def _refuse_link_out(folder: Path, file: Path) -> None:
    """A copied link would publish whatever file of this machine it names. The Hub's cache has links in
    snapshots/REVISION to blobs/ beside it: those are fine.
    """
    inside = folder.resolve()
    target = file.resolve()
    blobs = inside.parent.parent / "blobs" if inside.parent.name == "snapshots" else inside
    if not target.is_relative_to(inside) and not target.is_relative_to(blobs):
        raise ModelError(f"{file}: is a link to {target}, outside the folder; put a copy of that file there instead")


def _custom_code(folder: Path) -> Iterator[str]:
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            yield from _modules(read_json(folder / name).get("auto_map"))


def _modules(auto_map: Any) -> Iterator[str]:
    """Files of this folder that an auto_map names, as in "modeling_x.XModel"; those of other repositories have --."""
    values = auto_map.values() if isinstance(auto_map, dict) else ()
    for value in values:
        for entry in value if isinstance(value, list) else [value]:
            if isinstance(entry, str) and (module := re.fullmatch(r"(\w+)\.\w+", entry)):
                yield module[1] + ".py"
