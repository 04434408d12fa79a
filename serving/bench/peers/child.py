"""Serves one peer to `serving.bench.foreign` in lines of JSON, from an interpreter that has the peer and not Baton.

    python child.py PEER.py          PEER.py defines load(**settings) -> (version, generate)

    in    settings of load: {"model_dir": ..., "dtype": ..., ...}            out   {"version": ...}, once it is loaded
          {"prompts": [[token id, ...], ...], "num_new_tokens": N}                 {"token_ids": [[token id, ...], ...]}
          the same with "timed": true                        beside token_ids, "steps_s": [...], "last_steps": [...]
          end of file: exit

Steps: seconds from the request on until each step ended, and which one brought each prompt's last token. They are asked
for where a peer may have a GPU: `generate` returns a dictionary then.

A package that is not there is answered with {"missing": NAME}; any other failure ends the process with its traceback.
"""

from __future__ import annotations

import json
import os
import runpy
import sys


def main(peer: str) -> None:
    # Whatever a library prints must not get between our lines.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    # The folder of this file: a peer's file may bear the name of the package that it imports.
    del sys.path[0]

    def answer(message: dict[str, object]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    try:
        load = runpy.run_path(peer)["load"]
        version, generate = load(**json.loads(sys.stdin.readline()))
    except ModuleNotFoundError as error:
        answer({"missing": error.name})
        return
    answer({"version": version})
    for line in sys.stdin:
        texts = generate(**json.loads(line))
        answer(texts if isinstance(texts, dict) else {"token_ids": texts})


if __name__ == "__main__":
    main(sys.argv[1])
