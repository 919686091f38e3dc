"""Write a world of small pictures, with questions about them in English and Chinese: data for a model that sees.

    python dataset/pictures.py

Writes into its own folder pictures/*.png, vision.jsonl (what to train on) and vision_held_out.jsonl (what to ask
afterwards), the same every time. There are four kinds of pictures: coloured shapes in their places, things to count,
numbers and bar charts. Of each kind some combinations (a green circle, four red rings, the number 41, bars of heights
2, 1 and 3) are in no picture for training, and in every one that is held out: who has learned what the parts look like
can answer, who remembers pictures cannot. Every part is in many other combinations, from which to learn that it is one.

Descriptions (everything in a picture, in any order) are asked for in training alone. They teach to find things, which
is learned last: a plain question "where" is answered by guessing among the things that are there, for thousands of
steps, a description has many parts that are told only by looking for one of them (bench/NOTES.md has the trials).
"""

import io
import itertools
import json
import math
import os
import random
import sys
from collections import Counter
from pathlib import Path

from PIL import Image, ImageDraw

SEED = 23
SIZE, CELL = 36, 12  # pixels: of a picture, of one of its nine places
N_PICTURES = {"scene": 12000, "count": 8000, "number": 2500, "chart": 1500}
N_HELD_OUT = {"scene": 160, "count": 100, "number": 60, "chart": 40}
COLOURS = {  # English: Chinese, RGB; each begins with another letter, so that one look tells which word to begin
    "red": ("红色", (220, 40, 40)),
    "green": ("绿色", (40, 160, 60)),
    "blue": ("蓝色", (40, 80, 220)),
    "yellow": ("黄色", (240, 205, 30)),
    "orange": ("橙色", (245, 130, 30)),
    "pink": ("粉色", (250, 150, 200)),
    "violet": ("紫色", (140, 50, 170)),
    "cyan": ("青色", (60, 200, 220)),
    "silver": ("银色", (160, 160, 165)),
    "maroon": ("栗色", (105, 25, 35)),
}
SHAPES = {  # English: Chinese, corners, with x to the right and y downwards from -1 to 1; None: not of corners alone
    "circle": ("圆形", None),
    "ring": ("环形", None),
    "frame": ("方框", None),
    "square": ("正方形", [(-1, -1), (1, -1), (1, 1), (-1, 1)]),
    "diamond": ("菱形", [(0, -1), (1, 0), (0, 1), (-1, 0)]),
    "triangle": ("三角形", [(-1, 1), (1, 1), (0, -1)]),
    "hourglass": ("沙漏", [(-1, -1), (1, -1), (-1, 1), (1, 1)]),
    "line": ("横线", [(-1, -0.3), (1, -0.3), (1, 0.3), (-1, 0.3)]),
    "plus": ("加号", None),
    "arrow": ("箭头", [(-1, -0.3), (0, -0.3), (0, -1), (1, 0), (0, 1), (0, 0.3), (-1, 0.3)]),
}
PLACES = [  # row by row
    ("top left", "左上"),
    ("top", "上面"),
    ("top right", "右上"),
    ("left", "左边"),
    ("centre", "中间"),
    ("right", "右边"),
    ("bottom left", "左下"),
    ("bottom", "下面"),
    ("bottom right", "右下"),
]
FONT = {  # 3 x 5 pixels, row by row
    "0": "111101101101111",
    "1": "010110010010111",
    "2": "111001111100111",
    "3": "111001111001111",
    "4": "101101111001001",
    "5": "111100111001111",
    "6": "111100111101111",
    "7": "111001001001001",
    "8": "111101111101111",
    "9": "111101111001111",
}
MOST, N_BARS, TALLEST = 5, 3, 4  # things of a kind; bars, and their heights
MAX_QUESTIONS = 3  # about one picture
# kind of question -> (English, Chinese) wordings
QUESTIONS = {
    "what": (["What is at the {place}?"], ["{place}是什么？", "{place}有什么？"]),
    "where": (["Where is the {colour} {shape}?"], ["{colour}{shape}在哪里？", "{colour}的{shape}在哪里？"]),
    "colour": (["What colour is the {shape}?"], ["{shape}是什么颜色？"]),
    "shape": (["What shape is {colour}?"], ["{colour}的是什么形状？"]),
    "places": (["Where are the {colour} {shapes}?"], ["{colour}{shape}都在哪里？"]),
    "count": (["How many {colour} {shapes}?"], ["有几个{colour}{shape}？", "图中有多少个{colour}{shape}？"]),
    "count shapes": (["How many {shapes}?"], ["有几个{shape}？", "图中有多少个{shape}？"]),
    "count colours": (["How many things are {colour}?"], ["有几个{colour}的？", "图中有多少个{colour}的？"]),
    "everything": (["What is there?"], ["图中有什么？"]),
    "every count": (["Count everything."], ["每种东西各有几个？"]),
    "number": (["What number is it?"], ["这是什么数字？", "图中的数字是多少？"]),
    "height": (["How high is the {colour} bar?"], ["{colour}的柱子有多高？"]),
    "highest": (["Which bar is highest?"], ["哪个柱子最高？"]),
}
Thing = tuple[str, str]  # its colour and shape
Fact = tuple[str, dict, tuple[str, str]]  # kind of question, its fields in both languages, both answers
Facts = list[list[Fact]]  # about every thing in a picture, one or several
Combinations = dict[str, list[tuple]]  # by kind of picture


def both(**pairs: tuple[str, str]) -> dict:
    """Fields of a question: a dict for each language."""
    return {language: {name: pair[language] for name, pair in pairs.items()} for language in (0, 1)}


def names(colour: str, shape: str) -> dict:
    plural = shape + ("es" if shape.endswith("s") else "s")
    return {"colour": (colour, COLOURS[colour][0]), "shape": (shape, SHAPES[shape][0]), "shapes": (plural, "")}


def paint(rng: random.Random, name: str) -> tuple[int, int, int]:
    """A shade of a colour."""
    return tuple(min(255, max(0, value + rng.randint(-12, 12))) for value in COLOURS[name][1])


def blank(rng: random.Random) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """An empty picture, nearly white, and what draws on it."""
    picture = Image.new("RGB", (SIZE, SIZE), tuple(rng.randint(235, 255) for _ in range(3)))
    return picture, ImageDraw.Draw(picture)


def draw_thing(draw: ImageDraw.ImageDraw, rng: random.Random, place: int, thing: Thing) -> None:
    """A shape of 7 or 9 pixels in one of nine places, a pixel off its middle at most."""
    row, column = divmod(place, 3)
    x, y = (CELL * i + CELL // 2 - rng.randint(0, 1) for i in (column, row))  # of the middle
    colour, shape = thing
    r, fill = rng.randint(3, 4), paint(rng, colour)
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif shape == "ring":
        draw.ellipse((x - r, y - r, x + r, y + r), outline=fill, width=2)
    elif shape == "frame":
        draw.rectangle((x - r, y - r, x + r, y + r), outline=fill, width=2)
    elif shape == "plus":
        draw.rectangle((x - 1, y - r, x + 1, y + r), fill=fill)
        draw.rectangle((x - r, y - 1, x + r, y + 1), fill=fill)
    else:
        draw.polygon([(round(x + r * i), round(y + r * j)) for i, j in SHAPES[shape][1]], fill=fill)


# ------------------------------------------------------------------------------------------------------ the kinds
# Each takes a combination, and by kind all those that are in training pictures, `free`; what else is in the picture is
# of these. It returns the picture, and what can be asked about it: of a combination held out, about that alone.


def scene(rng: random.Random, combination: Thing, free: Combinations) -> tuple[Image.Image, Facts]:
    """Three things in different places; combination: colour and shape of the first."""
    picture, draw = blank(rng)
    things = [combination, *rng.sample([thing for thing in free["scene"] if thing != combination], 2)]
    places = rng.sample(range(9), len(things))
    facts: Facts = []
    for i, thing in zip(places, things, strict=True):
        draw_thing(draw, rng, i, thing)
        if thing != combination and combination not in free["scene"]:
            continue
        named = names(*thing)
        fields, (colour, shape) = both(place=PLACES[i], **named), (named["colour"], named["shape"])
        what = f"{colour[0]} {shape[0]}", colour[1] + shape[1]
        facts.append([("what", fields, what), ("where", fields, PLACES[i])])
        if [other[1] for other in things].count(thing[1]) == 1:
            facts[-1].append(("colour", fields, colour))
        if [other[0] for other in things].count(thing[0]) == 1:
            facts[-1].append(("shape", fields, shape))
    if combination in free["scene"]:
        # in any order: the place of what was just named has to be looked for, which no other question teaches as well
        listed = [(about[0][2], about[1][2]) for about in rng.sample(facts, len(facts))]  # what each is, and where
        for about in facts:
            about.append(about[1])  # where is asked twice as often: it is learned last
        english = ", ".join(f"{what[0]} {where[0]}" for what, where in listed)
        chinese = "，".join(f"{what[1]}在{where[1]}" for what, where in listed)
        facts.append([("everything", both(), (english, chinese))])
    return picture, facts


def count(rng: random.Random, combination: tuple[int, str, str], free: Combinations) -> tuple[Image.Image, Facts]:
    """So many of a colour and shape, and others, some of the same colour or shape, all in different places."""
    picture, draw = blank(rng)
    n, *parts = combination
    known = [thing for thing in free["scene"] if thing != tuple(parts)]
    alike = [[thing for thing in known if thing[i] == parts[i]] for i in (0, 1)]
    counts = Counter([tuple(parts)] * n)
    for _ in range(rng.randint(0, 2)):
        m, thing = rng.randint(1, 3), rng.choice(rng.choice([*alike, known]))
        if thing not in counts and (m == 1 or (m, *thing) in free["count"]) and counts.total() + m <= 9:
            counts[thing] = m
    places: dict[Thing, list[int]] = {thing: [] for thing in counts}
    for place, thing in zip(rng.sample(range(9), counts.total()), counts.elements(), strict=False):
        draw_thing(draw, rng, place, thing)
        places[thing].append(place)
    if combination not in free["count"]:
        return picture, [[("count", both(**names(*parts)), (str(n), str(n)))]]
    facts: Facts = []
    for thing, m in counts.items():
        fields, shown = both(**names(*thing)), [PLACES[place] for place in sorted(places[thing])]
        answers = ", ".join(place[0] for place in shown), "、".join(place[1] for place in shown)
        facts += [[("where" if m == 1 else "places", fields, answers)], [("count", fields, (str(m), str(m)))]]
    for i, kind in enumerate(("count colours", "count shapes")):
        for part in dict.fromkeys(thing[i] for thing in counts):  # each of them once
            same = {thing: m for thing, m in counts.items() if thing[i] == part}
            facts.append([(kind, both(**names(*next(iter(same)))), (str(sum(same.values())),) * 2)])
    listed = [(names(*thing), counts[thing]) for thing in rng.sample(list(counts), len(counts))]
    english = ", ".join(f"{name['colour'][0]} {name['shape' if m == 1 else 'shapes'][0]}: {m}" for name, m in listed)
    chinese = "，".join(f"{name['colour'][1]}{name['shape'][1]}{m}个" for name, m in listed)
    facts.append([("every count", both(), (english, chinese))])
    return picture, facts


def number(rng: random.Random, combination: tuple[str, str], free: Combinations) -> tuple[Image.Image, Facts]:
    """Two digits."""
    picture, draw = blank(rng)
    fill, scale = paint(rng, rng.choice([name for name in COLOURS if name != "yellow"])), 4
    left, top = rng.randint(3, 5), rng.randint(6, 9)
    for i, digit in enumerate(combination):
        for j, is_on in enumerate(FONT[digit]):
            if is_on == "1":
                x, y = left + scale * (4 * i + j % 3), top + scale * (j // 3)
                draw.rectangle((x, y, x + scale - 1, y + scale - 1), fill=fill)
    text = "".join(combination)
    return picture, [[("number", both(), (text, text))]]


def chart(rng: random.Random, combination: tuple[int, ...], free: Combinations) -> tuple[Image.Image, Facts]:
    """Bars of different colours, with lines behind them that show the heights."""
    picture, draw = blank(rng)
    colours, unit = rng.sample(list(COLOURS), N_BARS), 8
    for line in range(TALLEST + 1):
        draw.line((0, SIZE - 2 - unit * line, SIZE, SIZE - 2 - unit * line), fill=(200, 200, 200))
    facts: Facts = []
    for i, (height, name) in enumerate(zip(combination, colours, strict=True)):
        left = CELL * i + rng.randint(2, 3)
        draw.rectangle((left, SIZE - 2 - unit * height, left + 6, SIZE - 2), fill=paint(rng, name))
        facts.append([("height", both(colour=(name, COLOURS[name][0])), (str(height), str(height)))])
    if combination.count(max(combination)) == 1:
        name = colours[combination.index(max(combination))]
        facts.append([("highest", both(), (name, COLOURS[name][0]))])
    return picture, facts


KINDS = {"scene": scene, "count": count, "number": number, "chart": chart}
THINGS = list(itertools.product(COLOURS, SHAPES))
COMBINATIONS = {  # all that there are, and how many of them are held out
    "scene": (THINGS, 8),
    "count": ([(n, *thing) for thing in THINGS for n in range(2, MOST + 1)], 40),
    "number": (list(itertools.product("0123456789", repeat=2)), 15),
    "chart": (list(itertools.product(range(1, TALLEST + 1), repeat=N_BARS)), 10),
}


def hold_out(rng: random.Random, combinations: list, n: int) -> list:
    """n of the combinations, spread evenly over their parts: every part is left in many others."""
    held_out: list[tuple] = []
    most = [math.ceil(n / len(set(parts))) for parts in zip(*combinations, strict=True)]  # with the same part
    for combination in rng.sample(combinations, len(combinations)):
        held = [[other[i] for other in held_out].count(part) for i, part in enumerate(combination)]
        if len(held_out) < n and all(a < b for a, b in zip(held, most, strict=True)):
            held_out.append(combination)
    return held_out


def split(rng: random.Random) -> tuple[Combinations, Combinations]:
    """(in pictures for training, held out): combinations of each kind; no picture counts what no scene shows."""
    free: Combinations = {}
    held: Combinations = {}
    for kind, (combinations, n) in COMBINATIONS.items():
        if kind == "count":
            combinations = [combination for combination in combinations if combination[1:] in free["scene"]]
        held[kind] = hold_out(rng, combinations, n)
        free[kind] = [combination for combination in combinations if combination not in held[kind]]
    return free, held


def make_pictures() -> tuple[list[tuple[Image.Image, list[dict]]], list[tuple[Image.Image, list[dict]]]]:
    """(pictures for training, held-out pictures), each with its questions and answers; the same on every call."""
    rng = random.Random(SEED)
    free, held = split(rng)
    training, held_out = [], []
    for kind, make in KINDS.items():
        for pool, n_pictures, where in (
            (free[kind], N_PICTURES[kind], training),
            (held[kind], N_HELD_OUT[kind], held_out),
        ):
            part = "training" if pool is free[kind] else "held out"
            own = random.Random(f"{SEED} {kind} {part}")  # other numbers of some pictures leave the others as they are
            for i in range(n_pictures):
                picture, facts = make(own, pool[i % len(pool)], free)
                where.append((picture, ask(own, facts, MAX_QUESTIONS if pool is free[kind] else 2)))
    rng.shuffle(training)
    return training, held_out


def ask(rng: random.Random, facts: Facts, n: int) -> list[dict]:
    """Up to n questions about different things in a picture, in one of both languages, and their answers."""
    language, samples = rng.randrange(2), []
    for about_one in rng.sample(facts, min(len(facts), n)):
        kind, fields, answers = rng.choice(about_one)
        question = rng.choice(QUESTIONS[kind][language]).format(**fields[language])
        samples.append({"question": question, "answer": answers[language]})
    return samples


def write(path: Path, contents: bytes) -> None:
    """Write a file whole, or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(contents)
    os.replace(temporary, path)


def main() -> None:
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(__doc__)
        return
    if sys.argv[1:]:
        sys.exit(f"error: unknown argument {sys.argv[1]}; python dataset/pictures.py takes none")
    folder, texts, images = Path(__file__).parent, {}, {}
    for name, prefix, pictures in zip(
        ("vision.jsonl", "vision_held_out.jsonl"), ("", "held_out_"), make_pictures(), strict=True
    ):
        lines = []
        for i, (picture, samples) in enumerate(pictures):
            file, contents = f"pictures/{prefix}{i:05}.png", io.BytesIO()
            picture.save(contents, "PNG")
            images[file] = contents.getvalue()
            lines += [json.dumps({"image": file, **sample}, ensure_ascii=False) + "\n" for sample in samples]
        texts[name] = "".join(lines)
    for name, text in texts.items():
        path = folder / name
        if path.exists() and path.read_text(encoding="utf-8", errors="replace") != text:
            sys.exit(f"error: {path} exists and holds something else; move it away first: nothing was written")
    (folder / "pictures").mkdir(exist_ok=True)
    for file, contents in images.items():
        write(folder / file, contents)
    print(f"{folder / 'pictures'}: {len(images):,} pictures, {sum(map(len, images.values())) / 1000:,.0f} KB")
    for name, text in texts.items():  # last: where it is, the pictures are
        write(folder / name, text.encode("utf-8"))
        print(f"{folder / name}: {len(text.splitlines()):,} lines")


if __name__ == "__main__":
    main()
