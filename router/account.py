"""What is counted about a request when something of it ends: outcome, times, stages, SLO."""

from __future__ import annotations

from router.generation import Generation, Outcome
from serving.metrics import Metrics

_PREFILL_STAGES = ("prefill_queue", "prefill")


class Account:
    """Writes the router's families of `serving.metrics`."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def rejected(self, reason: str) -> None:
        """A request that was never admitted."""
        self._metrics.add("baton_requests_rejected_total", reason=reason)

    def stages(self, generation: Generation, seconds: dict[str, float]) -> None:
        """What a worker measured. Only the first life's prefill counts towards TTFT."""
        for stage, value in seconds.items():
            if stage not in _PREFILL_STAGES:
                self._metrics.observe("baton_handoff_gap_seconds", value, stage=stage)
            elif generation.num_lives == 1:
                generation.stages[stage] = value
                self._metrics.observe("baton_ttft_stage_seconds", value, stage=stage)

    def first_token(self, generation: Generation) -> None:
        assert generation.first_s is not None
        assert generation.placed_s is not None
        ttft_s = generation.first_s - generation.arrived_s
        admission_s = generation.placed_s - generation.arrived_s
        known_s = admission_s + sum(generation.stages.get(stage, 0.0) for stage in _PREFILL_STAGES)
        generation.stages["admission"] = admission_s
        generation.stages["first_token"] = max(0.0, ttft_s - known_s)
        self._metrics.observe("baton_ttft_seconds", ttft_s)
        for stage in ("admission", "first_token"):
            self._metrics.observe("baton_ttft_stage_seconds", generation.stages[stage], stage=stage)

    def ended(self, generation: Generation, outcome: Outcome) -> None:
        """Once a request. The SLO is judged on what finished, and on what failed as missed."""
        self._metrics.add("baton_requests_total", outcome=outcome.value)
        if outcome is Outcome.CANCELLED:
            return
        tpot_s = _tpot_s(generation)
        if tpot_s is not None:
            self._metrics.observe("baton_tpot_seconds", tpot_s)
        failed = outcome is Outcome.FAILED
        ttft_s = None if generation.first_s is None else generation.first_s - generation.arrived_s
        ttft_met = not failed and ttft_s is not None and ttft_s <= generation.order.slo.ttft_s
        tpot_met = not failed and (tpot_s is None or tpot_s <= generation.order.slo.tpot_s)
        self._slo("ttft", ttft_met, "failure" if failed else _slowest(generation))
        self._slo("tpot", tpot_met, "failure" if failed else "decode")

    def _slo(self, slo: str, met: bool, blame: str) -> None:
        self._metrics.add("baton_slo_total", slo=slo, met=str(met).lower(), blame="" if met else blame)


def _tpot_s(generation: Generation) -> float | None:
    """Mean time per token after the first; None with fewer than two."""
    if generation.first_s is None or generation.last_s is None or len(generation.token_ids) < 2:
        return None
    return (generation.last_s - generation.first_s) / (len(generation.token_ids) - 1)


def _slowest(generation: Generation) -> str:
    return max(generation.stages, key=generation.stages.__getitem__, default="first_token")
