"""What a request may ask of the sampler, by name."""

from __future__ import annotations

from serving.core.request import SamplingParams

GREEDY = SamplingParams(temperature=0.0)
ASKED = {
    "greedy": GREEDY,
    "drawn": SamplingParams(temperature=0.8, seed=3),
    "truncated": SamplingParams(temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, seed=3),
    "penalised": SamplingParams(temperature=0.0, presence_penalty=0.5, frequency_penalty=0.2, repetition_penalty=1.1),
    "logprobs": SamplingParams(temperature=0.0, logprobs=5),
    "biased": SamplingParams(temperature=0.0, logit_bias={7: -3.0, 11: 2.0}),
}
ALL_AT_ONCE = SamplingParams(
    temperature=0.8, top_k=20, top_p=0.9, frequency_penalty=0.2, logit_bias={7: -3.0}, logprobs=5, seed=3
)
