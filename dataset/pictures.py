"""Write a world of small pictures, with questions about them in English and Chinese: data for a model that sees.

    python dataset/pictures.py

Writes into its own folder pictures/*.png, vision.jsonl (what to train on) and vision_held_out.jsonl (what to ask
afterwards), the same every time. There are four kinds of pictures: coloured shapes in their places, shapes to count,
numbers and bar charts. Of each kind some combinations (an orange ring, four crosses, the number 42, bars of heights 4,
1 and 3) are in no picture for training, and in every one that is held out: who has learned what the parts look like
can answer, who remembers pictures cannot.
"""

import io
import itertools
import json
import math
import os
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

SEED = 23
SIZE, CELL = 36, 12  # pixels: of a picture, of one of its nine places
N_PICTURES = {"scene": 5000, "count": 2500, "number": 2500, "chart": 2500}
N_HELD_OUT = {"scene": 160, "count": 60, "number": 60, "chart": 40}
COLOURS = {  # English, Chinese, RGB
    "red": ("红色", (220, 40, 40)),
    "green": ("绿色", (40, 160, 60)),
    "blue": ("蓝色", (40, 80, 220)),
    "yellow": ("黄色", (240, 205, 30)),
    "purple": ("紫色", (140, 50, 170)),
    "orange": ("橙色", (245, 130, 30)),
    "black": ("黑色", (30, 30, 30)),
    "pink": ("粉色", (250, 150, 200)),
}
SHAPES = {
    "circle": "圆形",
    "square": "正方形",
    "triangle": "三角形",
    "cross": "十字",
    "ring": "圆环",
    "diamond": "菱形",
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
N_BARS, TALLEST = 3, 4
MAX_TURNS = 3  # questions about one picture
MAX_CHARACTERS = 119  # of them all: block_size of config/model.json without the patches of a picture
# kind of question -> (English, Chinese) wordings
QUESTIONS = {
    "what": (["What is at the {place}?", "What do you see at the {place}?"], ["{place}是什么？", "{place}有什么？"]),
    "where": (["Where is the {colour} {shape}?"], ["{colour}{shape}在哪里？", "{colour}的{shape}在哪里？"]),
    "colour": (["What colour is the {shape}?", "Which colour does the {shape} have?"], ["{shape}是什么颜色？"]),
    "count": (
        ["How many {shapes} are there?", "How many {shapes} do you see?"],
        ["有几个{shapes}？", "图中有多少个{shapes}？"],
    ),
    "number": (["What number is it?", "Which number do you see?"], ["这是什么数字？", "图中的数字是多少？"]),
    "height": (["How high is the {colour} bar?"], ["{colour}的柱子有多高？"]),
    "highest": (["Which bar is the highest?", "What colour is the highest bar?"], ["哪个柱子最高？"]),
}
Fact = tuple[str, dict, tuple[str, str]]  # kind of question, its fields in both languages, both answers
Facts = list[list[Fact]]  # about every thing in a picture, one or several
Combinations = dict[str, list[tuple]]  # by kind of picture


def both(**pairs: tuple[str, str]) -> dict:
    """Fields of a question: a dict for each language."""
    return {language: {name: pair[language] for name, pair in pairs.items()} for language in (0, 1)}


def colour(name: str) -> tuple[str, str]:
    return name, COLOURS[name][0]


def shape(name: str) -> tuple[str, str]:
    return name, SHAPES[name]


def shapes(name: str) -> tuple[str, str]:
    return name + ("es" if name.endswith("s") else "s"), SHAPES[name]


def paint(rng: random.Random, name: str) -> tuple[int, int, int]:
    """A shade of a colour."""
    return tuple(min(255, max(0, value + rng.randint(-15, 15))) for value in COLOURS[name][1])


def blank(rng: random.Random) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """An empty picture, nearly white, and what draws on it."""
    picture = Image.new("RGB", (SIZE, SIZE), tuple(rng.randint(235, 255) for _ in range(3)))
    return picture, ImageDraw.Draw(picture)


def draw_shape(draw: ImageDraw.ImageDraw, rng: random.Random, place: int, name: str, colour_name: str) -> None:
    """A shape of 7 or 9 pixels in one of nine places, a pixel off its middle at most."""
    row, column = divmod(place, 3)
    x, y = (CELL * i + CELL // 2 - rng.randint(0, 1) for i in (column, row))  # of the middle
    radius, fill = rng.randint(3, 4), paint(rng, colour_name)
    left, top, right, bottom = x - radius, y - radius, x + radius, y + radius
    if name == "circle":
        draw.ellipse((left, top, right, bottom), fill=fill)
    elif name == "square":
        draw.rectangle((left, top, right, bottom), fill=fill)
    elif name == "triangle":
        draw.polygon([(left, bottom), (right, bottom), (x, top)], fill=fill)
    elif name == "cross":
        draw.rectangle((x - 1, top, x + 1, bottom), fill=fill)
        draw.rectangle((left, y - 1, right, y + 1), fill=fill)
    elif name == "ring":
        draw.ellipse((left, top, right, bottom), outline=fill, width=2)
    else:
        draw.polygon([(x, top), (right, y), (x, bottom), (left, y)], fill=fill)


# ------------------------------------------------------------------------------------------------------ the kinds
# Each takes a combination, and by kind all those that are in training pictures, `free`; what else is in the picture is
# of these. It returns the picture, and what can be asked about it: of a combination held out, about that alone.


def scene(rng: random.Random, combination: tuple[str, str], free: Combinations) -> tuple[Image.Image, Facts]:
    """Three things in different places; combination: colour and shape of the first."""
    picture, draw = blank(rng)
    things = [combination, *rng.sample([thing for thing in free["scene"] if thing != combination], 2)]
    places = rng.sample(range(9), len(things))
    for place, (colour_name, shape_name) in zip(places, things, strict=True):
        draw_shape(draw, rng, place, shape_name, colour_name)
    facts = []
    n_asked = 3 if combination in free["scene"] else 1
    for i, (colour_name, shape_name) in list(zip(places, things, strict=True))[:n_asked]:
        fields = both(place=PLACES[i], colour=colour(colour_name), shape=shape(shape_name))
        article = "an" if colour_name[0] in "aeiou" else "a"
        what = f"{article} {colour_name} {shape_name}", COLOURS[colour_name][0] + SHAPES[shape_name]
        facts.append([("what", fields, what), ("where", fields, PLACES[i])])
        if [thing[1] for thing in things].count(shape_name) == 1:
            facts[-1].append(("colour", fields, colour(colour_name)))
    return picture, facts


def count(rng: random.Random, combination: tuple[int, str], free: Combinations) -> tuple[Image.Image, Facts]:
    """So many of a shape, and some of another one, all in different places."""
    picture, draw = blank(rng)
    n, shape_name = combination
    n_others, other = rng.choice([pair for pair in free["count"] if pair[1] != shape_name and pair[0] + n <= 9])
    for i, place in enumerate(rng.sample(range(9), n + n_others)):
        name = shape_name if i < n else other
        draw_shape(draw, rng, place, name, rng.choice([thing[0] for thing in free["scene"] if thing[1] == name]))
    facts = [[("count", both(shapes=shapes(shape_name)), (str(n), str(n)))]]
    if combination in free["count"]:
        facts.append([("count", both(shapes=shapes(other)), (str(n_others), str(n_others)))])
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
    names, unit = rng.sample(list(COLOURS), N_BARS), 8
    for line in range(TALLEST + 1):
        draw.line((0, SIZE - 2 - unit * line, SIZE, SIZE - 2 - unit * line), fill=(200, 200, 200))
    for i, (height, name) in enumerate(zip(combination, names, strict=True)):
        left = CELL * i + rng.randint(2, 3)
        draw.rectangle((left, SIZE - 2 - unit * height, left + 6, SIZE - 2), fill=paint(rng, name))
    heights = zip(map(str, combination), names, strict=True)
    facts = [[("height", both(colour=colour(name)), (height, height))] for height, name in heights]
    if combination.count(max(combination)) == 1:
        facts.append([("highest", both(), colour(names[combination.index(max(combination))]))])
    return picture, facts


KINDS = {"scene": scene, "count": count, "number": number, "chart": chart}
COMBINATIONS = {  # all that there are, and how many of them are held out
    "scene": (list(itertools.product(COLOURS, SHAPES)), 6),
    "count": (list(itertools.product(range(1, 6), SHAPES)), 4),
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


def make_pictures() -> tuple[list[tuple[Image.Image, list[dict]]], list[tuple[Image.Image, list[dict]]]]:
    """(pictures for training, held-out pictures), each with its questions and answers; the same on every call."""
    rng = random.Random(SEED)
    held = {kind: hold_out(rng, *combinations) for kind, combinations in COMBINATIONS.items()}
    free = {kind: [c for c in combinations if c not in held[kind]] for kind, (combinations, _) in COMBINATIONS.items()}
    training, held_out = [], []
    for kind, make in KINDS.items():
        for pool, n_pictures, where in (
            (free[kind], N_PICTURES[kind], training),
            (held[kind], N_HELD_OUT[kind], held_out),
        ):
            for i in range(n_pictures):
                picture, facts = make(rng, pool[i % len(pool)], free)
                turns = as_turns(rng, facts)
                where.append((picture, [as_conversation(turns)] if pool is free[kind] else turns[:2]))
    rng.shuffle(training)
    return training, held_out


def as_turns(rng: random.Random, facts: Facts) -> list[dict]:
    """Questions about up to three of the things in a picture, in one of both languages, and their answers."""
    language, turns = rng.randrange(2), []
    for about_one in rng.sample(facts, min(len(facts), MAX_TURNS)):
        kind, fields, answers = rng.choice(about_one)
        question = rng.choice(QUESTIONS[kind][language]).format(**fields[language])
        turns.append({"question": question, "answer": answers[language]})
    while sum(len(turn["question"]) + len(turn["answer"]) + 3 for turn in turns) > MAX_CHARACTERS:
        turns.pop()
    return turns


def as_conversation(turns: list[dict]) -> dict:
    """A question and its answer, or a conversation: the picture is read once for all of its questions."""
    if len(turns) == 1:
        return turns[0]
    roles = {"question": "user", "answer": "assistant"}
    return {"messages": [{"role": roles[name], "content": text} for turn in turns for name, text in turn.items()]}


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
