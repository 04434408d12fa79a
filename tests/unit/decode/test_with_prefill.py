"""Both schedulers over one pool and one set of slots, as mode `both` runs them, on pages that hardly suffice."""

from itertools import cycle

from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.manager import KVManager
from serving.aggregated import Aggregated
from serving.core.request import SamplingParams
from serving.engine.drafting import Drafting
from tests.scheduler_factory import FakeExecutor, RowStore, expected_tokens


class _Turns(Drafting):
    """Drafts as many as the list says, in turn."""

    def __init__(self, numbers: list[int]) -> None:
        super().__init__(3, lambda num_rows, num_drafts: 1.0)
        self._numbers = cycle(numbers)

    def choose(self, num_rows: int, most: int) -> int:
        return next(self._numbers)


REQUEST = st.tuples(st.integers(1, 150), st.sampled_from([0, 64, 1000]))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    shapes=st.lists(REQUEST, min_size=1, max_size=7),
    num_pages=st.integers(4, 8),
    max_batched_tokens=st.sampled_from([64, 100, 512]),
    run_ahead=st.booleans(),
    eager=st.booleans(),
    drafts=st.lists(st.integers(0, 3), max_size=4),
)
def test_every_request_ends_with_its_own_text_and_every_page_is_given_back(
    shapes: list[tuple[int, int]],
    num_pages: int,
    max_batched_tokens: int,
    run_ahead: bool,
    eager: bool,
    drafts: list[int],
) -> None:
    store = RowStore()
    manager = KVManager(num_pages, salt=b"test", on_free=store.clear)
    engine = Aggregated(
        FakeExecutor(store, eager=eager),
        manager,
        num_slots=3,
        max_batched_tokens=max_batched_tokens,
        max_model_len=4 * 64,
        run_ahead=run_ahead,
        drafting=_Turns(drafts) if drafts else None,
    )
    prompts = [[i if i < fork else 900 + i for i in range(num_tokens)] for num_tokens, fork in shapes]
    answers = engine.generate(prompts, SamplingParams(), 70)
    assert answers == [expected_tokens(prompt, 70) for prompt in prompts]
    manager.check()
    assert manager.num_available == num_pages
