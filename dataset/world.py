"""Generate the quickstart's synthetic corpus: a small fictional world in English and Chinese.

    python dataset/world.py     writes dataset/pretrain.txt, sft.jsonl and held_out.jsonl (never overwrites other text)

The pretraining text states facts about fictional islands, each in several paraphrases, and shows four skills: adding,
reversing, spelling, counting letters. The fine-tuning samples ask about both. held_out.jsonl is the test set:

- its facts are in the pretraining text, but no fine-tuning sample asks for them, in any wording or either language. A
  correct answer shows knowledge learned in pretraining and elicited by fine-tuning on other questions.
- its sums and words occur in neither file. A correct answer shows a skill that generalises.
"""

import json
import os
import random
import sys
from pathlib import Path

SEED = 20240601
N_ISLANDS = 28
TELLINGS = 20  # sentences per fact and language: paraphrases help recall (Allen-Zhu & Li 2023, arXiv:2309.14316)
N_SUMS, N_WORDS, N_ASKED = 2400, 1500, 500  # in the pretraining text; in fine-tuning samples, per skill
HELD_OUT = {"fact": 80, "sum": 40, "reverse": 30, "spell": 25, "count": 25}

VALUES = {
    "animal": "fox 狐狸,bear 熊,wolf 狼,heron 鹭,otter 水獭,seal 海豹,deer 鹿,hare 野兔,crab 螃蟹,owl 猫头鹰",
    "colour": "red 红色,blue 蓝色,green 绿色,white 白色,black 黑色,yellow 黄色,purple 紫色,grey 灰色",
    "fruit": "plum 李子,pear 梨,fig 无花果,lemon 柠檬,melon 甜瓜,grape 葡萄,peach 桃子,cherry 樱桃",
    "instrument": "drum 鼓,flute 笛子,harp 竖琴,violin 小提琴,horn 号角,bell 铃铛,piano 钢琴,gong 锣",
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
    "instrument": (
        [
            "The instrument of {i} is the {v}.",
            "The {v} is the instrument of {i}.",
            "The instrument played on {i} is the {v}.",
        ],
        ["What is the instrument of {i}?", "Which instrument is played on {i}?", "Name the instrument of {i}."],
        ["{i}的乐器是{v}。", "{v}是{i}的乐器。", "{i}人演奏的乐器是{v}。"],
        ["{i}的乐器是什么？", "{i}人演奏什么乐器？", "请说出{i}的乐器。"],
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


def make_world() -> tuple[list[str], list[dict[str, str]], list[dict[str, str]]]:
    """(pretraining lines, fine-tuning samples, held-out samples), the same on every call."""
    rng = random.Random(SEED)
    sentences, asked, held_out = [], [], []

    islands = make_islands(rng)
    kept_back = set(rng.sample([(i, name) for i in range(N_ISLANDS) for name in FACTS], HELD_OUT["fact"] // 2))
    for i, island in enumerate(islands):
        for language in (0, 1):
            for _ in range(TELLINGS):
                told = [capitalised(rng.choice(FACTS[n][2 * language]).format(**island[n][language])) for n in FACTS]
                rng.shuffle(told)
                # several facts per line repeat the island's name: the model learns to copy it from the context
                sentences += [" ".join(told[:2]), " ".join(told[2:])]
            for name, fields in island.items():
                statements, questions = FACTS[name][2 * language : 2 * language + 2]
                answer = statements[0].format(**fields[language])
                samples = [{"question": q.format(**fields[language]), "answer": answer} for q in questions]
                if (i, name) in kept_back:
                    held_out.append(rng.choice(samples))
                else:
                    asked += samples

    sums = rng.sample([(a, b) for a in range(10, 100) for b in range(10, 100)], N_SUMS + HELD_OUT["sum"])
    n_words = N_WORDS + sum(HELD_OUT[skill] for skill in ("reverse", "spell", "count"))
    words = set()
    while len(words) < n_words:
        words.add(invented_word(rng))
    words = rng.sample(sorted(words), n_words)
    pools = {skill: sums if skill == "sum" else words for skill in SKILLS}

    def asked_and_told(skill: str, item: tuple[int, int] | str) -> tuple[dict[str, str], str]:
        language = rng.randrange(2)
        fields = skill_fields(skill, item, language)
        statements, questions = SKILLS[skill][2 * language : 2 * language + 2]
        question = rng.choice(questions).format(**fields)
        return {"question": question, "answer": fields["v"]}, capitalised(rng.choice(statements).format(**fields))

    for skill, pool in pools.items():
        for _ in range(HELD_OUT[skill]):
            item = pool.pop()
            if item[::-1] in pool:
                pool.remove(item[::-1])  # b + a would leak a + b, and a reversed word the word
            held_out.append(asked_and_told(skill, item)[0])
    for skill, pool in pools.items():
        for i, item in enumerate(pool):
            sample, sentence = asked_and_told(skill, item)
            sentences.append(sentence)
            if i < N_ASKED:
                asked.append(sample)
    rng.shuffle(sentences)
    rng.shuffle(asked)
    return sentences, asked, held_out


def main() -> None:
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
