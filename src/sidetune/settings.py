"""What is typed behind ``--set``, and what is said where it is not taken."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import yaml
from pydantic import ValidationError

from sidetune.errors import RecipeError

SHOWN = 200  # characters of a value that an error repeats
# of settings whose types say little: what they are, and what to type
EXPECTED = {
    "backbone.pooled": "null, or 2 or more. Type: --set backbone.pooled=2",
    "clips.crops": "1 or 3. Type: --set clips.crops=3",
    "clips.frames": "a whole number, 1 or more. Type: --frames 8",
    "features.tiles": "0, or 2 to 8. Type: --set features.tiles=2",
    "fleet.folds": "2 or more, or column. Type: --folds 5",
    "head.ridge": "0 or more and below 1, or auto. Type: --set head.ridge=auto",
    "side.taps": "all, last or a list. Type: --set side.taps=[block.12]",
}
Parts = Mapping[str, Mapping[str, Any]]  # a recipe's fields by part


def not_a_setting(setting: str, name: str, text: str, fields: Parts) -> str:
    """What to type for a setting without its part, or without a value."""
    parts = [part for part, inside in fields.items() if name in inside]
    example = f"{parts[0]}.{name}={text or '..'}" if parts else "side.rank=16"
    return f"--set got {setting!r}, expected part.field=value. Type: --set {example}"


def setting_value(setting: str, text: str) -> Any:  # noqa: ANN401 - any YAML value
    """The value of a setting.

    Raises:
        RecipeError: it is not YAML.
    """
    try:
        return yaml.load(text, Loader=NoAliases)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = shortened(" ".join(str(error).split()))[1:-1]
        raise RecipeError(
            f"--set {shortened(setting)}: the value is not YAML ({reason}). Type: --set side.rank=16"
        ) from None


class NoAliases(yaml.SafeLoader):
    """YAML without aliases: nine lines of them stand for a billion values."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:  # noqa: ANN401 - as there
        """As there, but for aliases."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias, *name, is not taken")
        return super().compose_node(parent, index)


def shortened(value: Any) -> str:  # noqa: ANN401 - whatever was typed
    """A value as an error repeats it."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} .."


def complaint(error: ValidationError, fields: Parts, methods: Collection[str]) -> str:
    """The first complaint in our words: the dotted key, what was got, what was expected."""
    first = error.errors()[0]
    location = [str(step) for step in first["loc"]]
    if location[0] == "side" and len(location) > 1 and location[1] in methods:
        location.pop(1)  # the union's tag is no part of the key
    if location[:2] in (["side", "taps"], ["fleet", "folds"], ["head", "ridge"]):
        location = location[:2]  # below it stand the branches of its type
    if len(location) == 1 and isinstance(first["input"], dict):
        location += list(first["input"])[:1]  # an unknown part: say the whole key that was typed
    key = ".".join(location)
    if first["type"] == "extra_forbidden":
        known = [f"{part}.{field}" for part, names in fields.items() for field in names]
        inside = [name for name in known if name.startswith(f"{location[0]}.")]
        return f"no setting {key!r}.{_nearest_setting(key, known, inside)}"
    got = shortened(first["input"])
    if key in EXPECTED:
        return f"{key} is {got}, expected {EXPECTED[key]}"
    hint = ""
    if first["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", first["ctx"]["expected"])  # ``'a', 'b' or 'c'``
        close = difflib.get_close_matches(str(first["input"])[:99], choices, n=1)
        hint = f". Did you mean {close[0]!r}?" if close else ""
    return f"{key} is {got}: {first['msg'][:1].lower()}{first['msg'][1:]}{hint}"


def _nearest_setting(key: str, known: Sequence[str], inside: Sequence[str]) -> str:
    """The nearest of all settings, then those of the same part, or the parts where there is no such part."""
    close = difflib.get_close_matches(key[:99], known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    parts = sorted({name.partition(".")[0] for name in known})
    listed = f"Known: {', '.join(sorted(inside))}" if inside else f"Parts: {', '.join(parts)}"
    return f"{hint} {listed}."
