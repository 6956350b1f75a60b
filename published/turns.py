"""One row of a data file -> the turns of a conversation, in every format that is read here.

A field that would change what is trained on is honoured, or refused with its name; the plan names all that are left.
A field of null is one that is not there.
"""

import json
from typing import NamedTuple

from published.rows import half_pair

ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant"}
ROLES |= {"system": "system", "developer": "system"}
SWITCHES = (  # 1 or true: trained on; 0 or false: context only
    "weight train trained training trainable train_on_turn supervised loss loss_weight loss_mask loss_scale "
    "compute_loss sample_weight"
).split()
VERDICTS = ("label", "kto_tag")  # the same where it is true or false: whether an answer is a good one
REFUSED = {  # fields that nothing here can honour, and why
    "reasoning_content reasoning reasoning_details thinking think thought": "no template here writes reasoning",
    "tools functions tool_calls tool_call_id tool_choice function_call": "no template here writes tools",
    "image images image_url video videos audio audios documents": "only text is read",
    "context input": "only Alpaca has a place beside the question; put it into the question",
    "chosen rejected": "pairs of answers need another objective; give the good one as completion",
    "chat_template chat_template_kwargs": "the form is that of --template",
}
MASKS = "mask masked mask_loss ignore_loss train_detail".split()  # 0 may mean either
WHY = {name: why for names, why in REFUSED.items() for name in names.split()}
WHY |= dict.fromkeys(MASKS, "an answer is trained on whole, or by a weight of 0 not at all")
FORMATS = [{"messages"}, {"conversations"}, {"instruction", "output"}, {"prompt", "completion"}, {"text"}]
NOTHING = ("", [], {}, False, "[]", "{}", "null")  # values with which a refused field says nothing


class Turn(NamedTuple):
    role: str  # system, user, input (Alpaca's, after its user turn) or assistant
    text: str | None  # None: the turn that the model will generate
    train: bool = True  # of an assistant's turn: trained on, or context only


class Fields:
    """The fields of a row or a turn, each read once; `at` begins every message about them."""

    def __init__(self, at: str, given: dict):
        self.at, self.left = at, {name: value for name, value in given.items() if value is not None}

    def take(self, *names: str, usual=None) -> tuple:
        """(name, value) of the one of these that is there, else the first name and `usual`."""
        found = [(name, self.left.pop(name)) for name in names if name in self.left]
        if any(value != found[0][1] for _, value in found):
            raise ValueError(f"{self.at}{' and '.join(name for name, _ in found)} say different things; leave one out")
        return found[0] if found else (names[0], usual)

    def text(self, *names: str, usual: str | None = None) -> str:
        return text(self.at, *self.take(*names, usual=usual))

    def train(self, usual: bool, role: str = "assistant") -> bool:
        """Whether an answer is trained on."""
        verdicts = [name for name in VERDICTS if isinstance(self.left.get(name), bool)]
        name, value = self.take(*SWITCHES, *verdicts, usual=usual and role == "assistant")
        if not isinstance(value, (int, float)) or value not in (0, 1):
            raise ValueError(f"{self.at}{name} is {value!r:.60}, expected 1 (trained on) or 0 (context only)")
        if value and role != "assistant":
            raise ValueError(f"{self.at}{name} is {value!r}, but only answers are trained on, and this is the {role}'s")
        return bool(value)

    def ignored(self) -> set[str]:
        """What nobody read and changes nothing; ValueError where a field would change something."""
        for name, value in self.left.items():
            if name in WHY and (value not in NOTHING or name in MASKS):
                raise ValueError(f"{self.at}{name}: {WHY[name]}; take out the field, or the row")
        return self.left.keys() - WHY.keys()


def text(at: str, name: str, value) -> str:
    """A string, or a list of parts {"type": "text", "text": string} as one string."""
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        return "".join(text(at, f"{name}[{i}]", part) for i, part in enumerate(value))
    if isinstance(value, dict):
        part = Fields(f"{at}{name}.", value)
        if (kind := part.take("type", usual="text")[1]) not in ("text", "input_text", "output_text"):
            raise ValueError(f"{at}{name} is of type {kind!r:.60}, and only text is read")
        value = part.take("text", usual=value)[1]
        part.ignored()
        if not part.train(True):
            raise ValueError(f"{at}{name} is a part that is not trained on; make it a turn of its own")
    if not isinstance(value, str):
        raise ValueError(f"{at}{name} is {'missing' if value is None else type(value).__name__}, expected a string")
    if half := half_pair(value):
        raise ValueError(f"{at}{name} holds {half}, half of a surrogate pair; was an emoji cut in two?")
    return value


def shown(value) -> str:
    return json.dumps(value, default=str)[:60]


def parse(where: str, row: dict) -> tuple[str, list[Turn], set[str]]:
    """(format, turns, ignored fields) of a row; the format is "dialogue", "alpaca" or "text".

    `where` names the row in messages: ValueError says which field is wrong, what it is, and what was expected.
    """
    fields, ignored = Fields(f"{where}: ", row), set()
    if not any(needed <= fields.left.keys() for needed in FORMATS):
        lists = [name for name, x in fields.left.items() if isinstance(x, list) and x and isinstance(x[0], dict)]
        inside = f". Are the rows in {lists[0]!r}? Take them out: jq '.{lists[0]}' OLD > NEW" if lists else ""
        if not inside:
            fields.ignored()
        raise ValueError(
            f"{where}: fields {', '.join(map(repr, fields.left)) or 'none'}; expected conversations (LIMA, ShareGPT), "
            f"messages, instruction and output (Alpaca), prompt and completion, or text{inside}"
        )
    train, (name, talk) = fields.train(True), fields.take("messages", "conversations")
    system = fields.text("system", "system_prompt", "system_message", usual="")
    _, history = fields.take("history", usual=[])

    def turns(name: str, value, role: str, train: bool) -> list[Turn]:
        """A list of turns, or a text that is one turn of this role."""
        if isinstance(value, list) and value and isinstance(value[0], dict) and value[0].keys() & {"role", "from"}:
            return dialogue(fields.at, name, value, train, ignored)
        return [Turn(role, text(fields.at, name, value), train)]

    if talk is not None:
        found, out = "dialogue", dialogue(fields.at, name, talk, train, ignored)
    elif fields.left.keys() >= {"instruction", "output"}:
        found, out = "alpaca", [Turn("user", fields.text("instruction"))]
        given = fields.text("input", usual="")
        out += [Turn("input", given)] * bool(given) + [Turn("assistant", fields.text("output"), train)]
    elif fields.left.keys() >= {"prompt", "completion"}:
        found, out = "dialogue", turns(*fields.take("prompt"), "user", False)
        out += turns(*fields.take("completion"), "assistant", train)
    else:
        found, out = "text", [Turn("assistant", fields.text("text"), train)]
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise ValueError(f"{where}: history is {shown(history)}, expected a list of [instruction, answer]")
    earlier = [(f"history[{i}][{j}]", pair[j], j) for i, pair in enumerate(history) for j in (0, 1)]
    earlier = [Turn(("user", "assistant")[j], text(fields.at, name, value), train) for name, value, j in earlier]
    first = [out.pop(0)] if out[0].role == "system" else []
    if system and first and first[0].text != system:
        raise ValueError(f"{where}: system and the first turn say different things; leave one out")
    out = [Turn("system", system)] * bool(system and not first) + first + earlier + out
    if found == "text" and len(out) > 1:
        raise ValueError(f"{where}: text with system or history, expected text alone")
    return found, out, ignored | fields.ignored()


def dialogue(at: str, name: str, given, train: bool, ignored: set[str]) -> list[Turn]:
    """The turns in a list; names of fields that change nothing are added to `ignored`."""
    if not isinstance(given, list) or not given:
        raise ValueError(f"{at}{name} is {shown(given)}, expected a list of turns")
    out = []
    for i, turn in enumerate(given):
        if isinstance(given[0], str) and name == "conversations":  # LIMA: the user begins, then they alternate
            out.append(Turn(("user", "assistant")[i % 2], text(at, f"{name}[{i}]", turn), train))
            continue
        fields = Fields(f"{at}{name}[{i}].", turn if isinstance(turn, dict) else {})
        _, role = fields.take("role", "from")
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"{at}{name}[{i}] is {shown(turn)}, expected a role: {', '.join(ROLES)}")
        content, learnt = fields.take("content", "value"), fields.train(train, ROLES[role])
        ignored |= fields.ignored()  # before an absent content is missed: tool_calls take its place
        out.append(Turn(ROLES[role], text(fields.at, *content), learnt))
    return out
