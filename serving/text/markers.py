"""The control tokens of the DeepSeek-V3 family, by the text that names them in `tokenizer.json`.

The bars are U+FF5C and the low blocks U+2581. Only code in this package may put one into a prompt, and only by id.
"""

from __future__ import annotations

from typing import Final

BOS: Final = "<｜begin▁of▁sentence｜>"
EOS: Final = "<｜end▁of▁sentence｜>"
USER: Final = "<｜User｜>"
ASSISTANT: Final = "<｜Assistant｜>"

THINK: Final = "<think>"
END_THINK: Final = "</think>"

CALLS_BEGIN: Final = "<｜tool▁calls▁begin｜>"
CALLS_END: Final = "<｜tool▁calls▁end｜>"
CALL_BEGIN: Final = "<｜tool▁call▁begin｜>"
CALL_END: Final = "<｜tool▁call▁end｜>"
OUTPUTS_BEGIN: Final = "<｜tool▁outputs▁begin｜>"
OUTPUTS_END: Final = "<｜tool▁outputs▁end｜>"
OUTPUT_BEGIN: Final = "<｜tool▁output▁begin｜>"
OUTPUT_END: Final = "<｜tool▁output▁end｜>"
SEP: Final = "<｜tool▁sep｜>"
