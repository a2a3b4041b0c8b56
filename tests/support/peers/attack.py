"""One attack, in a process that loads little else, which costs more than most attacks.

`python -m tests.support.peers.attack NAME TARGET` runs it (`TARGET` is a Target as JSON): it prints `under way`, and as
JSON what it did, once all of it is with the other side, and then holds what it opened until its stdin ends. An attack
that came to little, because it was kept from it or for any other reason, fails instead.
"""

from __future__ import annotations

import json
import sys

from tests.support.peers.greedy import GREEDY
from tests.support.peers.hostile import ATTACKS
from tests.support.peers.wire import Attack, Target

EVERY_ATTACK: dict[str, Attack] = ATTACKS | GREEDY


def main() -> None:
    name, target = sys.argv[1:]
    for counts in EVERY_ATTACK[name](Target(**json.loads(target))):
        print("under way", json.dumps(counts or {}), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
