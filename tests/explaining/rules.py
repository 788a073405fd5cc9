"""A rule-based replacement for the language model that explains latents.

Its explanation is the word that is marked most often. Its verdict on a passage is yes if the
passage contains the word that the explanation names.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any


def reply(body: Mapping[str, Any]) -> str:
    """Return the response to a request."""
    system, user = (message["content"] for message in body["messages"])
    passages = re.findall(r"^Passage \d+: (.*)$", user, re.MULTILINE)
    if "EXPLANATION:" in system:
        marked = [w for p in passages for m in re.findall(r"<<(.*?)>>", p) for w in m.split()]
        word = Counter(marked).most_common(1)[0][0]
        return f"It may be many things.\nEXPLANATION: the word {word}"
    (word,) = re.findall(r"the word (\w+)", system)
    return json.dumps([int(word in passage.split()) for passage in passages])
