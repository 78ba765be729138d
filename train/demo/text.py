"""The demo's text: small word problems, answered in prose for the base and as YAML for the fine-tuning.

Everything follows from a seed: the same call gives the same rows on every machine.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

NAMES = (
    *("Mia", "Tom", "Ada", "Ben", "Eva", "Max", "Lea", "Sam"),
    *("Ida", "Leo", "Zoe", "Jan", "Amy", "Kai", "Nora", "Finn"),
)
THINGS = (
    *("pens", "cups", "books", "apples", "stamps", "coins", "shells", "cards"),
    *("plums", "keys", "hats", "balls", "tickets", "stones", "pears", "buttons"),
)
LARGEST = 10

Row = dict[str, list[dict[str, str]]]

# (operation, question, answer in prose). {a} and {b} are the numbers, {c} is the result.
TEMPLATES = (
    ("+", "{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?",
     "{name} has {a} + {b} = {c} {things} now."),
    ("+", "{name} finds {a} {things} in the morning and {b} in the evening. How many {things} are that?",
     "That makes {a} + {b} = {c} {things}."),
    ("+", "There are {a} {things} in the box. {name} puts {b} more into it. How many {things} are in the box?",
     "The box holds {a} + {b} = {c} {things}."),
    ("-", "{name} has {a} {things} and gives {b} away. How many {things} are left?",
     "{name} keeps {a} - {b} = {c} {things}."),
    ("-", "There were {a} {things} on the table. {name} took {b} of them. How many {things} are still there?",
     "There are still {a} - {b} = {c} {things} on the table."),
    ("-", "{name} needs {a} {things} and has {b}. How many {things} are missing?",
     "{name} still needs {a} - {b} = {c} {things}."),
)  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """One question with both of its answers."""

    question: str
    prose: str
    record: dict[str, str]


def make_problem(generator: random.Random) -> Problem:
    """One word problem with two different numbers from 2 to ``LARGEST``, the larger one first."""
    sign, question, prose = generator.choice(TEMPLATES)
    b, a = sorted(generator.sample(range(2, LARGEST + 1), 2))
    result = a + b if sign == "+" else a - b
    words = {"name": generator.choice(NAMES), "things": generator.choice(THINGS), "a": a, "b": b, "c": result}
    record = {"sum": f"{a} {sign} {b}", "answer": str(result), "unit": str(words["things"])}
    return Problem(question.format(**words), prose.format(**words), record)


def record_problem(problem: Problem) -> Problem:
    """A question that gives the record's parts, in any order: the base knows the notation, if not when to use it."""
    parts = [f"{key} {value}" for key, value in problem.record.items()]
    random.Random(problem.question).shuffle(parts)
    return Problem(f"Write as YAML: {', '.join(parts)}.", problem.prose, problem.record)


def distinct_problems(count: int, seed: int, unlike: Iterable[Problem] = ()) -> list[Problem]:
    """``count`` word problems, no question twice and none of ``unlike``: a held-out question was never trained on."""
    generator = random.Random(seed)
    seen = {problem.question for problem in unlike}
    problems: list[Problem] = []
    while len(problems) < count:
        problem = make_problem(generator)
        if problem.question not in seen:
            seen.add(problem.question)
            problems.append(problem)
    return problems


def in_prose(problem: Problem) -> Row:
    """A row of the ``messages`` format that answers in a sentence."""
    return _row(problem.question, problem.prose)


def in_yaml(problem: Problem) -> Row:
    """A row of the ``messages`` format that answers with a record: {sum: 4 + 3, answer: 7, unit: pens}."""
    return _row(problem.question, f"{{{', '.join(f'{key}: {value}' for key, value in problem.record.items())}}}")


def _row(question: str, answer: str) -> Row:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
