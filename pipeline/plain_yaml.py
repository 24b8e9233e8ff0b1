"""YAML as plain data: mappings, lists and scalars.

In: the bytes of a file that may be a stranger's. Out: what it holds; and back. Tags, which can name Python objects, and
aliases, by which some hundred bytes hold a thousand million items or themselves, are refused.
"""

from collections import Counter
from collections.abc import Hashable, Mapping
from typing import Any

import yaml


def field_name(key: object) -> str:
    """`batch-size` and `batch_size` are one key."""
    return str(key).replace("-", "_")


class _PlainLoader(yaml.SafeLoader):
    """A key that stands twice is an error too, since one of them would be ignored."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            raise _fault(event, f"'*{event.anchor}' stands for what is elsewhere; write it out")
        if (tag := getattr(event, "tag", None)) is not None:
            raise _fault(event, f"the tag '{tag}' says what kind a value is; leave it out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = Counter(field_name(key.value) for key, _ in node.value)
        for key, number in keys.items():
            if number > 1:
                raise _fault(node, f"key '{key}' stands twice")
        return super().construct_mapping(node, deep)


def _fault(where: yaml.Event | yaml.Node, what: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=what, problem_mark=where.start_mark)  # type: ignore[arg-type]


def read_yaml(data: bytes) -> Any:
    """The one document in `data`, in any of YAML's encodings.

    Raises:
        ValueError: it is no YAML, or not plain; in one line.
    """
    try:
        return yaml.load(data, Loader=_PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that is none
        raise ValueError(f"expected plain YAML, found: {' '.join(str(error).split())}") from error


class _PlainDumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        """What stands twice is written twice."""
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    """Text; its rarer line ends are lost unless they are written as escapes."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, '"' if set(text) & set("\x85\u2028\u2029") else None)


_PlainDumper.add_representer(str, _text)


def write_yaml(content: Mapping[str, Any]) -> str:
    """Plain data as text that `read_yaml` reads back, keys in their order."""
    text: str = yaml.dump(dict(content), Dumper=_PlainDumper, sort_keys=False, allow_unicode=True)
    return text
