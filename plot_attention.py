"""Draw which patches of an image a model looks at, token by token of its answer.

python plot_attention.py -m checkpoint/vision.pt --image dataset/pictures/held_out_00058.png -p "上面是什么？"

Writes attention.png: layers from top to bottom, tokens of the answer from left to right. A patch is the brighter the
more attention the position that predicts the token pays to it, on average over the heads of the layer; below stands how
much of the layer's attention all patches get. The rest goes to the text.
"""

from pathlib import Path

import numpy as np
import torch

from base.configuration import Parser, UserError, run_main
from base.files import atomic_write
from layers.attention_maps import attention_maps
from serving.text_generator import GenerationConfig, TextGenerator, load_text_generator
from text.tokenizer import TextStream

CHINESE_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "PingFang SC", "Microsoft YaHei")  # of Linux, macOS, Windows


def patch_attention(generator: TextGenerator, question: str, image: np.ndarray) -> tuple[list[str], np.ndarray]:
    """The tokens of the greedy answer, and the weights (n_layer, n_tokens, rows, columns) of their looks at patches.

    A character of several tokens stands at the last of them. Weights are means over heads; of a layer and token, those
    of all patches and of all text before it add up to 1.
    """
    drawn: list[int] = []
    for _ in generator.answer(question, GenerationConfig(temperature=0.0), drawn=drawn, image=image):
        pass
    ids = generator.prompt_ids(question, image=image)
    idx = torch.tensor([[*ids, *drawn]], device=generator.device)[:, :-1]  # the last token is read by none
    images = torch.from_numpy(image)[None].to(generator.device)
    weights = attention_maps(generator.model, idx, images=images)[:, 0].mean(1)  # (n_layer, T, T)
    # a token is predicted by the position before it
    looks = weights[:, len(ids) - 1 :, idx[0] == generator.tokenizer.vocab_size]  # (n_layer, n_tokens, n_patches)
    side = generator.model.config.image_size // generator.model.config.patch_size
    stream, stops = TextStream(generator.tokenizer), generator.tokenizer.stop_tokens
    tokens = [stream.rest() + "(end)" if token in stops else stream.push(token) for token in drawn]
    if drawn and drawn[-1] not in stops:
        tokens[-1] += stream.rest()
    return tokens, looks.float().cpu().numpy().reshape(*looks.shape[:2], side, side)


def draw(output: str, image: np.ndarray, tokens: list[str], looks: np.ndarray) -> None:
    """Write the figure as PNG; image (3, S, S), looks as of patch_attention()."""
    import matplotlib

    matplotlib.use("Agg")  # works without a display
    import matplotlib.pyplot as plt
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    plt.rcParams["font.family"] = ["DejaVu Sans", *(name for name in CHINESE_FONTS if name in installed)]
    pixels = image.transpose(1, 2, 0)
    n_layer, n_tokens, side, _ = looks.shape
    size = 1.2, 1.35  # inches of a panel
    figure, grid = plt.subplots(
        *(n_layer, n_tokens + 1),
        figsize=(size[0] * (n_tokens + 1), size[1] * n_layer),
        layout="constrained",
        squeeze=False,
    )
    for axis in grid.flat:
        axis.set(xticks=[], yticks=[])
    for layer, row in enumerate(grid):
        row[0].imshow(pixels)
        row[0].set_ylabel(f"layer {layer + 1}")
        for axis, token, weights in zip(row[1:], tokens, looks[layer], strict=True):
            shade = np.kron(weights / max(weights.max(), 1e-9), np.ones((len(pixels) // side,) * 2))  # (S, S), 0 to 1
            axis.imshow((pixels * (0.15 + 0.85 * shade[..., None])).astype(np.uint8))
            axis.set_xlabel(f"{weights.sum():.0%}", fontsize=8)
            if not layer:
                axis.set_title(token.replace("$", r"\$"))
    with atomic_write(output) as file:
        figure.savefig(file, dpi=70, format="png")
    plt.close(figure)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("-m", "--model", default="checkpoint/vision.pt", help="checkpoint [checkpoint/vision.pt]")
    parser.add_argument("--image", required=True, action="append", metavar="FILE", help="png or jpeg file")
    parser.add_argument("-p", "--prompt", required=True, help="the question about it")
    parser.add_argument("-o", "--output", default="attention.png", help="figure to write [attention.png]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps [auto]")
    args, _ = parser.parse()
    if not args.output.endswith(".png") or not Path(args.output).parent.is_dir():
        raise UserError(f"{args.output}: must be a picture's name (.png) in a folder that exists")
    if len(args.image) > 1:
        raise UserError("command line: --image: one image goes with a question")
    generator = load_text_generator(args.model, args.device, True)
    image = generator.open_image(args.image[0])
    tokens, looks = patch_attention(generator, args.prompt, image)
    draw(args.output, image, tokens, looks)
    print(f"{args.output}: {''.join(tokens).removesuffix('(end)')}")


if __name__ == "__main__":
    run_main(main)
