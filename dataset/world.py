"""Generate the quickstart's synthetic corpus: a small fictional world in English and Chinese.

    python dataset/world.py     writes dataset/pretrain.txt, sft.jsonl and held_out.jsonl (never overwrites other text)

The pretraining text states facts about fictional islands, each in several paraphrases, and shows four skills: adding,
reversing, spelling, counting letters. The fine-tuning samples ask about both, over one turn or several; they also hold
small talk, and questions from outside of this world, whose answer is that the model does not know (everyday.py has the
wordings). Some of them stand in the pretraining text, too, so that fine-tuning is short and forgets few facts.
held_out.jsonl is the test set:

- its facts are in the pretraining text, but no fine-tuning sample asks for them, in any wording or either language. A
  correct answer shows knowledge learned in pretraining and elicited by fine-tuning on other questions.
- its sums and words occur in neither file. A correct answer shows a skill that generalises.
"""

import itertools
import json
import os
import random
import re
import sys
from pathlib import Path

from everyday import (
    ABSENT_FACTS,
    COMMON_CHARACTERS,
    ISLAND_LIST_QUESTIONS,
    ISLAND_QUESTIONS,
    OPENINGS,
    OTHER_CALCULATIONS,
    OUTSIDE,
    SMALL_TALK,
    SUM_QUESTIONS,
)

SEED = 20240601
N_ISLANDS = 28
N_PARAPHRASES = 20  # sentences per fact and language: they help recall (Allen-Zhu & Li 2023, arXiv:2309.14316)
N_TOLD = {"sum": 2400, "reverse": 3000, "spell": 1500, "count": 1500}  # in the pretraining text; reversing is hardest
N_ASKED = 500  # in fine-tuning samples, per skill
HELD_OUT = {"fact": 80, "sum": 40, "reverse": 30, "spell": 25, "count": 25}
N_SMALL_SUMS = 500  # with a number below 10
N_CONVERSATIONS = 4800  # in the pretraining text: fine-tuning is then short, and forgets fewer facts
N_TYPED, N_OUTSIDE, N_INVENTED, N_LONG = 1400, 80, 200, 150
N_FOLLOW_UPS, N_UNRELATED = 1300, 800
MAX_CHARACTERS = 128  # of a conversation, special tokens included: block_size of config/model.json

VALUES = {
    "animal": "fox 狐狸,bear 熊,wolf 狼,heron 鹭,otter 水獭,seal 海豹,deer 鹿,hare 野兔,crab 螃蟹,owl 猫头鹰",
    "colour": "red 红色,blue 蓝色,green 绿色,white 白色,black 黑色,yellow 黄色,purple 紫色,grey 灰色",
    "fruit": "plum 李子,pear 梨,fig 无花果,lemon 柠檬,melon 甜瓜,grape 葡萄,peach 桃子,cherry 樱桃",
    "tree": "oak 橡树,pine 松树,palm 棕榈树,birch 桦树,elm 榆树,cedar 雪松,willow 柳树,maple 枫树",
}
# English statements, English questions, Chinese statements, Chinese questions; {i} is the island, {v} the value
FACTS = {
    "capital": (
        ["The capital of {i} is {v}.", "{v} is the capital of {i}.", "The capital of the island {i} is {v}."],
        ["What is the capital of {i}?", "Which city is the capital of {i}?", "Name the capital of {i}."],
        ["{i}的首都是{v}。", "{v}是{i}的首都。", "{i}岛的首都是{v}。"],
        ["{i}的首都是哪里？", "{i}的首都叫什么？", "请说出{i}的首都。"],
    ),
    "animal": (
        [
            "The animal of {i} is the {v}.",
            "The {v} is the animal of {i}.",
            "The animal on the coat of arms of {i} is the {v}.",
        ],
        ["What is the animal of {i}?", "Which animal stands for {i}?", "Name the animal of {i}."],
        ["{i}的动物是{v}。", "{v}是{i}的动物。", "代表{i}的动物是{v}。"],
        ["{i}的动物是什么？", "代表{i}的是什么动物？", "请说出{i}的动物。"],
    ),
    "colour": (
        ["The colour of {i} is {v}.", "{v} is the colour of {i}.", "The colour of the flag of {i} is {v}."],
        ["What is the colour of {i}?", "Which colour is the flag of {i}?", "Name the colour of {i}."],
        ["{i}的颜色是{v}。", "{v}是{i}的颜色。", "{i}国旗的颜色是{v}。"],
        ["{i}的颜色是什么？", "{i}的国旗是什么颜色？", "请说出{i}的颜色。"],
    ),
    "fruit": (
        ["The fruit of {i} is the {v}.", "The {v} is the fruit of {i}.", "The fruit that grows on {i} is the {v}."],
        ["What is the fruit of {i}?", "Which fruit grows on {i}?", "Name the fruit of {i}."],
        ["{i}的水果是{v}。", "{v}是{i}的水果。", "{i}出产的水果是{v}。"],
        ["{i}的水果是什么？", "{i}出产什么水果？", "请说出{i}的水果。"],
    ),
    "tree": (
        ["The tree of {i} is the {v}.", "The {v} is the tree of {i}.", "The tree that grows on {i} is the {v}."],
        ["What is the tree of {i}?", "Which tree grows on {i}?", "Name the tree of {i}."],
        ["{i}的树是{v}。", "{v}是{i}的树。", "{i}人种的树是{v}。"],
        ["{i}的树是什么？", "{i}人种什么树？", "请说出{i}的树。"],
    ),
}
# the same four lists; {a} and {b} are the summands, {w} the word, {v} the answer
SKILLS = {
    "sum": (
        ["{a} + {b}: {v}"],
        ["What is {a} + {b}?", "What is the sum of {a} and {b}?"],
        ["{a}加{b}：{v}"],
        ["{a}加{b}等于多少？", "{a}与{b}的和是多少？"],
    ),
    "reverse": (
        ["The word {w} reversed is {v}.", "Backwards, {w} reads {v}."],
        ["What is the word {w} reversed?", "How does {w} read backwards?"],
        ["单词{w}倒过来是{v}。", "{w}反着读是{v}。"],
        ["单词{w}倒过来是什么？", "{w}反着读是什么？"],
    ),
    "spell": (
        ["The word {w} is spelled {v}.", "{w} is spelled {v}."],
        ["How is the word {w} spelled?", "Spell {w}."],
        ["单词{w}的拼写是{v}。", "{w}拼作{v}。"],
        ["单词{w}怎么拼写？", "请拼写{w}。"],
    ),
    "count": (
        ["The word {w} has {v} letters.", "{w} has {v} letters."],
        ["How many letters has the word {w}?", "How many letters are in {w}?"],
        ["单词{w}有{v}个字母。", "{w}有{v}个字母。"],
        ["单词{w}有几个字母？", "{w}里有几个字母？"],
    ),
}
CHINESE_SYLLABLES = "安巴洛卡莱多尔伦米娜奥萨维塔里诺贝索林格亚森托尼科拉曼德沃"
CHINESE_FACTS = {"capital": "首都", "animal": "动物", "colour": "颜色", "fruit": "水果", "tree": "树"}
# questions that refer back, in English and in Chinese: {f} is the name of a fact, {i} another island
FOLLOW_UPS = {
    "same island": (
        "And its {f}?|What about its {f}?|And the {f}?|What is its {f}?|And what is its {f}?|Its {f}?"
        "|How about the {f}?",
        "那它的{f}呢？|它的{f}呢？|{f}呢？|它的{f}是什么？|那么{f}呢？|还有{f}呢？|那{f}是什么？",
    ),
    "other island": (
        "And the {f} of {i}?|What about the {f} of {i}?|And what is the {f} of {i}?|The {f} of {i}?",
        "那{i}的{f}呢？|{i}的{f}呢？|那么{i}的{f}是什么？|还有{i}的{f}呢？",
    ),
    "same fact": (
        "And {i}?|What about {i}?|And that of {i}?|How about {i}?",
        "那{i}呢？|{i}呢？|那么{i}呢？|还有{i}呢？",
    ),
}
UNKNOWN = ("I do not know that.", "这个我不知道。")

Turn = tuple[str, str]  # a question and its answer


def invented_name(random: random.Random, taken: set[str]) -> tuple[str, str]:
    """A random (English, Chinese) name; no two share the first 3 letters or 2 Chinese characters."""
    while True:
        english = "".join(random.choice("bdfgklmnprstvz") + random.choice("aeiou") for _ in range(2))
        english = (english + random.choice(["n", "r", "l", "s", "nd", "m", "rk"])).capitalize()
        chinese = "".join(random.sample(CHINESE_SYLLABLES, 3))
        if english[:3] not in taken and chinese[:2] not in taken:
            taken.update((english[:3], chinese[:2]))
            return english, chinese


def invented_word(random: random.Random) -> str:
    """A random pronounceable word of 3 to 5 letters: consonants and vowels alternate."""
    length, start = random.randint(3, 5), random.randint(0, 1)
    return "".join(random.choice("aeiou" if (i + start) % 2 else "bcdfghklmnprstvwyz") for i in range(length))


def make_islands(random: random.Random) -> list[dict[str, list[dict[str, str]]]]:
    """For each island and fact: the template fields {"i": island, "v": value} in English and in Chinese."""
    taken: set[str] = set()
    choices = {name: [pair.split() for pair in text.split(",")] for name, text in VALUES.items()}
    islands = []
    for _ in range(N_ISLANDS):
        names = invented_name(random, taken)
        values = {f: random.choice(choices[f]) if f in choices else invented_name(random, taken) for f in FACTS}
        islands.append({f: [{"i": i, "v": v} for i, v in zip(names, values[f], strict=True)] for f in FACTS})
    return islands


def worked_sum(a: int, b: int, language: int) -> str:
    """The sum of two numbers below 100, worked out step by step: ones, then tens with the carry.

    A chain of thought (Wei et al. 2022, arXiv:2201.11903): each step is easy, and generated tokens hold the carry.
    """
    carry, ones = divmod(a % 10 + b % 10, 10)
    tens = a // 10 + b // 10 + carry
    form = ("{} + {} = {}, {} + {} + {} = {}, so {}.", "{}加{}得{}，{}加{}加{}得{}，所以是{}。")[language]
    return form.format(a % 10, b % 10, 10 * carry + ones, a // 10, b // 10, carry, tens, a + b)


def skill_fields(skill: str, item: tuple[int, int] | str, language: int) -> dict[str, str]:
    """The template fields of a skill: the operands, and the answer as "v"."""
    if skill == "sum":
        return {"a": str(item[0]), "b": str(item[1]), "v": worked_sum(*item, language)}
    return {"w": item, "v": {"reverse": item[::-1], "spell": "-".join(item), "count": str(len(item))}[skill]}


def capitalised(text: str) -> str:
    return text[0].upper() + text[1:] if " " in text and text[0] in "abcdefghijklmnopqrstuvwxyz" else text


def language_of(text: str) -> int:
    """0: English, 1: Chinese."""
    return int(any("\u4e00" <= character <= "\u9fff" for character in text))


def statement(islands: list, i: int, name: str, language: int) -> str:
    """The sentence that answers a question about a fact."""
    return FACTS[name][2 * language][0].format(**islands[i][name][language])


def as_typed(rng: random.Random, question: str) -> str:
    """A question as people type it: maybe with an opening, in lower case, without the mark at its end."""
    language = language_of(question)
    if rng.random() < 0.15:
        question = rng.choice(OPENINGS[language]).format(question)
    if rng.random() < 0.3:
        question = question.replace("What is", "What's")
    if rng.random() < 0.3:
        question = question.replace("colour", "color")
    if rng.random() < 0.4:
        question = question.lower()
    if rng.random() < 0.4:
        question = question.rstrip("?.？。") or question
    return question


def as_sample(turns: list[Turn]) -> dict:
    """A line of a fine-tuning file."""
    if len(turns) == 1:
        return {"question": turns[0][0], "answer": turns[0][1]}
    roles = [("user", question) if i == 0 else ("assistant", answer) for question, answer in turns for i in (0, 1)]
    return {"messages": [{"role": role, "content": content} for role, content in roles]}


def as_text(turns: list[Turn]) -> str:
    """A line of the pretraining text: a conversation with the marks that fine-tuning puts around questions."""
    return "".join(f"<|InstructMark|>{question}<|ResponseMark|>{answer}" for question, answer in turns)


def fits(turns: list[Turn]) -> bool:
    return sum(len(question) + len(answer) + 3 for question, answer in turns) <= MAX_CHARACTERS


def fact_texts(rng: random.Random, islands: list, held_out_facts: set) -> tuple[list[str], list[Turn], list[Turn]]:
    """Pretraining lines, and the questions about facts: those that fine-tuning asks, and those that are held out."""
    sentences, asked, held_out = [], [], []
    for i, island in enumerate(islands):
        for language in (0, 1):
            for _ in range(N_PARAPHRASES):
                told = [capitalised(rng.choice(FACTS[n][2 * language]).format(**island[n][language])) for n in FACTS]
                rng.shuffle(told)
                # several facts per line repeat the island's name: the model learns to copy it from the context
                sentences += [" ".join(told[:2]), " ".join(told[2:])]
            for name, fields in island.items():
                questions = FACTS[name][2 * language + 1]
                answer = FACTS[name][2 * language][0].format(**fields[language])
                turns = [(question.format(**fields[language]), answer) for question in questions]
                if (i, name) in held_out_facts:
                    held_out.append(rng.choice(turns))
                else:
                    asked += turns
    return sentences, asked, held_out


def skill_texts(rng: random.Random) -> tuple[list[str], list[Turn], list[Turn], list[tuple[int, int]]]:
    """The same for the skills, and the pairs of summands that are not held out."""
    sentences, asked, held_out = [], [], []
    sums = rng.sample([(a, b) for a in range(10, 100) for b in range(10, 100)], N_TOLD["sum"] + HELD_OUT["sum"])
    n_words = N_TOLD["reverse"] + sum(HELD_OUT[skill] for skill in ("reverse", "spell", "count"))
    words, english = set(), set(re.findall("[a-z]+", " ".join(everyday_texts()).lower()))
    while len(words) < n_words:
        words |= {invented_word(rng)} - english  # a held-out word must occur nowhere
    words = rng.sample(sorted(words), n_words)
    pools = {skill: sums if skill == "sum" else words for skill in SKILLS}

    def turn_and_sentence(skill: str, item: tuple[int, int] | str) -> tuple[Turn, str]:
        language = rng.randrange(2)
        fields = skill_fields(skill, item, language)
        statements, questions = SKILLS[skill][2 * language : 2 * language + 2]
        question = rng.choice(questions).format(**fields)
        return (question, fields["v"]), capitalised(rng.choice(statements).format(**fields))

    for skill, pool in pools.items():
        for _ in range(HELD_OUT[skill]):
            item = pool.pop()
            if item[::-1] in pool:
                pool.remove(item[::-1])  # b + a would leak a + b, and a reversed word the word
            held_out.append(turn_and_sentence(skill, item)[0])
    for skill, pool in pools.items():
        for i, item in enumerate(pool[: N_TOLD[skill]]):
            turn, sentence = turn_and_sentence(skill, item)
            sentences.append(sentence)
            if i < N_ASKED:
                asked.append(turn)
    return sentences, asked, held_out, sums


def small_talk(rng: random.Random) -> list[Turn]:
    """Greetings, thanks, goodbyes, who the model is and what it can do."""
    turns = []
    for answers, *wordings in SMALL_TALK:
        for language, marks in enumerate((("", ".", "!", "?"), ("", "。", "！", "？", "~"))):
            for wording in wordings[language].split("|"):
                forms = {form + mark: None for form in (wording, wording.lower(), wording.upper()) for mark in marks}
                chosen = [wording, wording.lower(), *rng.sample(list(forms), 4)]
                turns += [(form, answers[language]) for form in dict.fromkeys(chosen)]
    return turns


def island_talk(rng: random.Random, islands: list, asked_facts: list[tuple[int, str]]) -> list[Turn]:
    """Which islands there are; of an island as such, one fact."""
    turns = []
    for language in (0, 1):
        names = [island["capital"][language]["i"] for island in islands]
        some = ("{}, {} and {} are some of them.", "比如{}、{}和{}。")[language].format(*names[:3])
        for question in ISLAND_LIST_QUESTIONS[language].split("|"):
            turns += [(form, some) for form in dict.fromkeys((question, question.lower(), as_typed(rng, question)))]
        for i, name in dict(reversed(asked_facts)).items():  # the first fact of each that is asked
            for question in rng.sample(ISLAND_QUESTIONS[language].split("|"), 3):
                turns.append((as_typed(rng, question.format(i=names[i])), statement(islands, i, name, language)))
    return turns


def sums_as_typed(rng: random.Random, pairs: list[tuple[int, int]]) -> list[Turn]:
    """Sums in the wordings that people use."""
    turns = []
    for a, b in pairs:
        question = rng.choice(rng.choice(SUM_QUESTIONS).split("|")).format(a=a, b=b)
        turns.append((as_typed(rng, question), worked_sum(a, b, language_of(question))))
    return turns


def everyday_questions(rng: random.Random) -> list[str]:
    """Questions that have nothing to do with this world, from all pairs of a template and a subject."""
    questions = []
    for templates, subjects in OUTSIDE:
        pairs = list(itertools.product(templates.split("|"), subjects.split("|")))
        for template, subject in rng.sample(pairs, min(len(pairs), N_OUTSIDE)):
            questions.append(capitalised(template.format(*subject.split(","))))
    characters = rng.sample(COMMON_CHARACTERS, len(COMMON_CHARACTERS))
    for start in range(0, len(characters), 4):  # whatever the characters: most of them occur in no other question
        template = rng.choice(
            ["{}是什么？", "{}", "什么是{}？", "{}怎么样？", "你知道{}吗？", "怎么{}？", "谁{}？", "{}有多少？"]
        )
        questions.append(template.format("".join(characters[start : start + 4])))
    return questions


def near_questions(rng: random.Random, islands: list) -> list[str]:
    """Questions like those about the world: what islands lack, islands that do not exist, other arithmetic."""
    questions, names = [], [island["capital"] for island in islands]
    taken = {part for fields in names for part in (fields[0]["i"][:3], fields[1]["i"][:2])}
    for language, (templates, absent, whole) in enumerate(ABSENT_FACTS):
        for name in [fields[language]["i"] for fields in names] * 2:
            template, fact = rng.choice(templates.split("|")), rng.choice(absent.split("|"))
            questions += [template.format(fact, i=name), rng.choice(whole.split("|")).format(i=name)]
        fact_questions = [question for forms in FACTS.values() for question in forms[2 * language + 1]]
        invented = [invented_name(rng, set(taken))[language] for _ in range(N_INVENTED)]
        for name in [*invented, *(fields[language]["v"] for fields in names)]:  # a capital is not an island
            questions.append(rng.choice(fact_questions).format(i=name))
        for name in invented[: N_INVENTED // 4]:
            questions.append(rng.choice(ISLAND_QUESTIONS[language].split("|")).format(i=name))
        for _ in range(60):
            template = rng.choice(OTHER_CALCULATIONS[language].split("|"))
            questions.append(template.format(rng.randint(2, 999), rng.randint(2, 99)))
    for _ in range(N_LONG):  # three digits are not in the world either, nor are words of six letters and more
        a, b = rng.randint(100, 9999), rng.randint(10, 999)
        questions.append(rng.choice(rng.choice(SUM_QUESTIONS).split("|")).format(a=a, b=b))
        language, skill = rng.randrange(2), rng.choice(["reverse", "spell", "count"])
        word = "".join(invented_word(rng) for _ in range(3))[: rng.randint(6, 11)]
        questions.append(rng.choice(SKILLS[skill][2 * language + 1]).format(w=word))
    return questions


def refusals(rng: random.Random, islands: list) -> list[Turn]:
    """Questions that the model cannot answer."""
    questions = [*everyday_questions(rng), *near_questions(rng, islands)]
    typed = [question if rng.random() < 0.5 else as_typed(rng, question) for question in questions]
    return [(question, UNKNOWN[language_of(question)]) for question in typed]


def follow_ups(rng: random.Random, islands: list, asked_facts: list[tuple[int, str]], language: int) -> list[Turn]:
    """A question about an island, then up to three that refer back to it, as far as they fit."""
    absent = ABSENT_FACTS[language][1].split("|")
    i = rng.randrange(N_ISLANDS)
    name = rng.choice([name for j, name in asked_facts if j == i])
    question = rng.choice(FACTS[name][2 * language + 1]).format(**islands[i][name][language])
    turns = [(question, statement(islands, i, name, language))]
    for _ in range(rng.choice((1, 2, 3))):
        kind = rng.choice(["same island"] * 3 + ["other island", "same fact"] + ["absent"] * 2)
        form = rng.choice(FOLLOW_UPS["same island" if kind == "absent" else kind][language].split("|"))
        if kind == "absent":
            turns.append((form.format(f=rng.choice(absent)), UNKNOWN[language]))
            name = ""
            continue
        choices = {
            "same island": [fact for fact in asked_facts if fact[0] == i and fact[1] != name],
            "other island": [fact for fact in asked_facts if fact[0] != i],
            "same fact": [fact for fact in asked_facts if fact[0] != i and fact[1] == name],
        }[kind]
        if not choices:
            continue
        i, name = rng.choice(choices)
        fact = (name, CHINESE_FACTS[name])[language]
        turns.append((form.format(f=fact, i=islands[i][name][language]["i"]), statement(islands, i, name, language)))
    turns = [(question if rng.random() < 0.6 else as_typed(rng, question), text) for question, text in turns]
    while not fits(turns):
        turns.pop()
    return turns


def conversations(rng: random.Random, islands: list, asked_facts: list, talk: list, singles: list) -> list[list[Turn]]:
    """Several turns: questions that refer back, and questions that have nothing to do with those before."""
    result = []
    for _ in range(N_FOLLOW_UPS):
        turns = follow_ups(rng, islands, asked_facts, rng.randrange(2))
        first = [rng.choice(talk)] if rng.random() < 0.3 else []
        result.append(first + turns if fits(first + turns) else turns)
    for _ in range(N_UNRELATED):
        turns = [rng.choice(talk if rng.random() < 0.3 else singles) for _ in range(rng.choice((2, 2, 3, 4)))]
        while not fits(turns):
            turns.pop(0)
        result.append(turns)
    for language in (0, 1):  # nothing to refer back to
        forms = FOLLOW_UPS["same island"][language].split("|")
        for form, name in itertools.product(forms * 2, FACTS):
            question = as_typed(rng, form.format(f=(name, CHINESE_FACTS[name])[language]))
            absent = rng.choice(forms).format(f=rng.choice(ABSENT_FACTS[language][1].split("|")))
            first = rng.choice([[], [rng.choice(talk)], [(as_typed(rng, absent), UNKNOWN[language])]])
            turns = [*first, (question, UNKNOWN[language])]
            result.append(turns if fits(turns) else turns[-1:])
    return result


def everyday_texts() -> list[str]:
    """All wordings of everyday.py."""
    texts = [text for answers, english, chinese in SMALL_TALK for text in (*answers, english, chinese)]
    texts += [text for pair in OUTSIDE for text in pair] + [text for three in ABSENT_FACTS for text in three]
    texts += [*ISLAND_LIST_QUESTIONS, *ISLAND_QUESTIONS, *OTHER_CALCULATIONS, *SUM_QUESTIONS]
    return [*texts, *OPENINGS[0], *OPENINGS[1]]


def general_text() -> list[str]:
    """Lines with the words and characters that people may type, so that the vocabulary has them."""
    lines = []
    for templates, subjects in OUTSIDE:
        if "," not in subjects and templates != "{}":
            words, language = subjects.split("|"), language_of(subjects)
            parts = [(", ", "、")[language].join(words[i : i + 6]) for i in range(0, len(words), 6)]
            lines += [("Elsewhere: {}.", "别处：{}。")[language].format(part) for part in parts]
    chinese = [c for c in dict.fromkeys("".join(everyday_texts())) if language_of(c)] + list(COMMON_CHARACTERS)
    lines += ["".join(chinese[i : i + 40]) for i in range(0, len(chinese), 40)]
    return [*lines, "".join(map(chr, range(32, 127))), "，。？！：；、“”‘’（）《》【】…—～·￥"]


def make_world() -> tuple[list[str], list[dict], list[dict]]:
    """(pretraining lines, fine-tuning samples, held-out samples), the same on every call."""
    rng = random.Random(SEED)
    islands = make_islands(rng)
    all_facts = [(i, name) for i in range(N_ISLANDS) for name in FACTS]
    order = rng.sample(all_facts, len(all_facts))
    # at most two of an island: fine-tuning must ask about each, or the model forgets it
    first_two = [fact for n, fact in enumerate(order) if [i for i, _ in order[:n]].count(fact[0]) < 2]
    held_out_facts = set(first_two[: HELD_OUT["fact"] // 2])  # in both languages
    asked_facts = [fact for fact in all_facts if fact not in held_out_facts]
    sentences, asked, held_out = fact_texts(rng, islands, held_out_facts)
    skill_sentences, skill_asked, skill_held_out, sums = skill_texts(rng)
    asked += skill_asked
    small_sums = rng.sample([(a, b) for a in range(100) for b in range(100) if min(a, b) < 10], N_SMALL_SUMS)
    typed_sums = sums_as_typed(rng, rng.sample(sums, N_ASKED) + small_sums)
    typed = [(as_typed(rng, question), answer) for question, answer in rng.sample(asked, N_TYPED)]
    talk = small_talk(rng)
    singles = [*asked, *typed, *typed_sums, *island_talk(rng, islands, asked_facts), *refusals(rng, islands)]
    samples = [[turn] for turn in [*talk, *singles]]
    samples += conversations(rng, islands, asked_facts, talk, singles)
    sentences += [*skill_sentences, *general_text(), *map(as_text, rng.sample(samples, N_CONVERSATIONS))]
    rng.shuffle(sentences)
    rng.shuffle(samples)
    return sentences, [as_sample(turns) for turns in samples], [as_sample([t]) for t in held_out + skill_held_out]


def main() -> None:
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(__doc__)
        return
    if sys.argv[1:]:
        sys.exit(f"error: unknown argument {sys.argv[1]}; python dataset/world.py takes none")
    folder = Path(__file__).parent
    sentences, asked, held_out = make_world()
    texts = {
        "pretrain.txt": "\n".join(sentences) + "\n",
        "sft.jsonl": "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in asked),
        "held_out.jsonl": "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in held_out),
    }
    for name, text in texts.items():
        path = folder / name
        if path.exists() and path.read_text(encoding="utf-8", errors="replace") != text:
            sys.exit(f"error: {path} exists and holds something else; move it away first: nothing was written")
    for name, text in texts.items():
        temporary = folder / f".{name}.tmp"
        temporary.write_text(text, encoding="utf-8", newline="\n")
        os.replace(temporary, folder / name)
        print(f"{folder / name}: {len(text.splitlines()):,} lines, {len(text.encode('utf-8')) / 1000:,.0f} KB")


if __name__ == "__main__":
    main()
