"""YAML in which a key that stands twice is an error; PyYAML takes the last one, and the first is lost in silence."""

from typing import Any

import yaml
from yaml.composer import ComposerError


def read_yaml(text: str) -> Any:
    """What a text of YAML says. yaml.YAMLError: it is none, or a key stands twice."""
    loader = _OneOfEach(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


class _OneOfEach(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise ComposerError(None, None, f"the key {key.value!r} stands twice", key.start_mark)
                seen.add((key.tag, key.value))
        return node
