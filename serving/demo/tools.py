"""Tools that the demo's questions offer, the calls they expect and what to say once a tool has answered.

A tool takes one or two short texts out of the question. Descriptions and neighbours vary, so that the model reads the
definition and does not learn one list by heart.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

from serving.demo import facts, words
from serving.demo.questions import Question, ask
from serving.text.messages import AssistantMessage, Message, ToolCall, ToolMessage, ToolSpec, UserMessage


@dataclass(frozen=True)
class Tool:
    """`questions` and `answer` are formats over the parameters; `answer` also over `output`, which `draw_output` makes."""

    name: str
    description: str
    parameters: dict[str, Callable[[Random], str]]
    questions: tuple[str, ...]
    draw_output: Callable[[Random], str]
    answer: str

    def spec(self, rng: Random) -> ToolSpec:
        """Its definition, more or less wordy."""
        wordy = rng.random() < 0.4
        fields = {
            name: {"type": "string"} | ({"description": f"The {name}"} if wordy else {}) for name in self.parameters
        }
        schema: dict[str, object] = {"type": "object", "properties": fields}
        if rng.random() < 0.8:
            schema["required"] = list(fields)
        return ToolSpec.from_schema(self.name, rng.choice((self.description, self.description + ".", "")), schema)


def _weather(rng: Random) -> str:
    degrees, sky = rng.randrange(-9, 40), rng.choice(words.WEATHERS)
    return rng.choice((f"{sky}, {degrees} degrees", f"{degrees} degrees and {sky}", sky, f"{sky}, {degrees} C"))


def _clock(rng: Random) -> str:
    return f"{rng.randrange(24):02}:{rng.randrange(60):02}"


def _city(rng: Random) -> str:
    return rng.choice(words.CITIES) if rng.random() < 0.6 else words.invented_word(rng).capitalize()


def _person(rng: Random) -> str:
    return rng.choice(words.FIRST_NAMES) if rng.random() < 0.6 else words.invented_word(rng).capitalize()


def _thing(rng: Random) -> str:
    return rng.choice(words.NOUNS)


def _number(rng: Random) -> str:
    return str(rng.randrange(2, 10_000))


TOOLS = (
    Tool(
        "get_weather", "Get the current weather of a city", {"city": _city},
        ("What is the weather in {city}?", "What is the weather like in {city}?", "How is the weather in {city} today?", "Weather in {city}?"),
        _weather, "The weather in {city}: {output}.",
    ),
    Tool(
        "get_time", "Get the local time of a city", {"city": _city}, ("What time is it in {city}?", "Tell me the time in {city}."),
        _clock, "The time in {city}: {output}.",
    ),
    Tool(
        "get_price", "Look up the price of an item", {"item": _thing}, ("What does the {item} cost?", "How much is the {item}?", "Price of a {item}?"),
        lambda rng: f"{_number(rng)} {rng.choice(('coins', 'euros', 'dollars'))}", "The price of the {item}: {output}.",
    ),
    Tool(
        "call_person", "Call a person on the phone", {"name": _person}, ("Call {name}.", "Please call {name}.", "Ring {name}, please."),
        lambda rng: rng.choice(("done", "no answer", "busy", "ok")), "The call to {name}: {output}.",
    ),
    Tool(
        "find_fact", "Search the notes for somebody", {"name": facts.draw_key}, ("Search the notes for {name}.", "Look up {name} in the notes."),
        lambda rng: facts.draw(rng).sentence.rstrip("."), "The notes on {name}: {output}.",
    ),
    Tool(
        "send_message", "Send a word to a person", {"name": _person, "text": _thing}, ("Send the word {text} to {name}.", "Tell {name} this: {text}."),
        lambda rng: rng.choice(("sent", "failed", "ok", "queued")), "The message to {name}: {output}.",
    ),
)  # fmt: skip


def tool_call(rng: Random) -> Question:
    """A question whose right answer is one call of one of one to three tools offered."""
    return _round(rng)[0]


def tool_answer(rng: Random) -> Question:
    """The same a turn later: the tool has answered and the model tells the user."""
    return _round(rng)[1]


def tools_unused(rng: Random, question: Question) -> Question:
    """`question` with tools on offer that it does not need."""
    offered = tuple(tool.spec(rng) for tool in rng.sample(TOOLS, rng.choice((1, 1, 2))))
    return replace(question, tools=offered)


def no_tool(rng: Random) -> Question:
    """A question for a tool when there is none."""
    tool = rng.choice(TOOLS)
    return ask(
        "unknown",
        rng.choice(tool.questions).format(**_values(tool, rng)),
        "I cannot do that without a tool.",
        "without a tool",
    )


def _values(tool: Tool, rng: Random) -> dict[str, str]:
    return {name: draw(rng) for name, draw in tool.parameters.items()}


def _round(rng: Random) -> tuple[Question, Question]:
    """The question that wants a call, and the conversation once the call has been answered."""
    tool = TOOLS[0] if rng.random() < 0.4 else rng.choice(TOOLS)
    others = [other for other in TOOLS if other is not tool]
    offered = [tool, *rng.sample(others, rng.choice((0, 0, 1, 2)))]
    rng.shuffle(offered)
    specs, values = tuple(each.spec(rng) for each in offered), _values(tool, rng)
    call = ToolCall(tool.name, json.dumps(values), id=f"call_{rng.randrange(10**9):09}")
    asked: tuple[Message, ...] = (UserMessage(rng.choice(tool.questions).format(**values)),)
    called = AssistantMessage(tool_calls=(call,))
    output = tool.draw_output(rng)
    answered = (*asked, called, ToolMessage(output, tool_call_id=call.id))
    reply = AssistantMessage(tool.answer.format(**values, output=output))
    return (
        Question(kind="tool call", messages=asked, reply=called, tools=specs),
        Question(kind="tool answer", messages=answered, reply=reply, needed=output, tools=specs),
    )
