"""A page on which anyone tries an image.

`app.json` next to this file describes the page; models/ holds the ONNX files. Nothing that a
visitor sends is kept: files lie in a folder of their own, are deleted after minutes, and all of
them when the process ends. Nobody is told of visits.
"""

import atexit
import functools
import html
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ENDS = (signal.SIGINT, signal.SIGTERM)
VISITORS = tempfile.TemporaryDirectory(prefix="wds-demo-")
atexit.register(VISITORS.cleanup)


def leave(*_: object) -> None:
    """End at the first signal, and ignore all others.

    Without a handler, or interrupted by a second signal, the files of visitors would stay.
    """
    for number in ENDS:
        signal.signal(number, signal.SIG_IGN)
    sys.exit(0)


for each in ENDS:
    signal.signal(each, leave)
# Gradio reads the environment when it is imported.
os.environ |= {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_TEMP_DIR": VISITORS.name,
    "HF_HUB_DISABLE_TELEMETRY": "1",
}

import gradio as gr  # noqa: E402
from classifier import MOST_BYTES, Classifier, Refused, open_image  # noqa: E402
from PIL import Image  # noqa: E402

HERE = Path(__file__).parent
ABOUT: dict[str, Any] = json.loads((HERE / "app.json").read_text())
MODELS = {title: HERE / "models" / name for title, name in ABOUT["models"].items()}
# Gradio deletes files of visitors that are older, and looks for them every SWEEP_SECONDS.
KEPT_SECONDS = 300
SWEEP_SECONDS = 60
CAPTION = (
    "Only the probabilities of the weights that can be chosen above are calibrated, where that "
    "could be."
)
TOP = 5  # classes in an answer
HEIGHT = 320  # of both pictures, pixels: they fit a phone's screen together with the answer
CSS = "footer {display: none} .learn td, .learn th {padding: .2em .8em; text-align: left}"
# An answer shows no clock, and the page's functions are in no public list of calls.
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


class Photo(gr.Image):
    """An image as it was sent.

    gr.Image itself would open a file before anything is known about it.
    """

    is_template = True

    def preprocess(self, payload: Any) -> Image.Image | None:
        """Return the image in a visitor's file, or answer with the reason why there is none."""
        if payload is None:
            return None
        try:
            return read_upload(payload.path)
        except Refused as error:
            raise gr.Error(str(error), print_exception=False) from error
        except OSError as error:
            message = "This file is not there any more: send it again."
            raise gr.Error(message, print_exception=False) from error


def read_upload(name: str | None) -> Image.Image:
    """Return the image in a file that a visitor sent, upright and in RGB."""
    if not name:
        raise Refused("This is no file.")
    path = Path(name)
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise Refused(f"This file has {size >> 20} MB; at most {MOST_BYTES >> 20} MB are taken.")
    return open_image(path.read_bytes())


@functools.cache
def load_classifier(title: str) -> Classifier:
    """Return the model of weights, which is loaded once."""
    return Classifier(MODELS[title])


def answer(
    image: Image.Image | None, title: str
) -> tuple[dict[str, float] | None, Image.Image | None, str]:
    """Answer for an image.

    Args:
        image: The image; None if it was removed.
        title: The weights that were chosen.

    Returns:
        The probabilities of the likeliest classes by name, the heat map if the model has one, and a
        note in Markdown.
    """
    if image is None:
        return None, None, ""

    # The answer, and the time that it took.
    started = time.perf_counter()
    model = load_classifier(title)
    found = model.answer(image)
    names = model.facts["names"]
    shares = {}
    for label in found.top(TOP):
        shares[names[label]] = float(found.probabilities[label])
    heat = None
    if found.heat is not None:
        heat = model.draw_heat(image, found.heat)
    took = 1000 * (time.perf_counter() - started)

    # The note under it.
    notes = []
    if max(shares.values()) < model.facts["sure"]:
        notes.append("**Not sure:** likelier wrong than right.")
    notes.append(f"{took:.0f} ms, of which {1000 * found.seconds:.0f} ms in the model")
    flaw = calibration_flaw(model)
    if flaw:
        notes.append(flaw)
    return shares, heat, " · ".join(notes)


def calibration_flaw(model: Classifier) -> str:
    """Return why the model's probabilities are not calibrated; empty if they are."""
    calibration = model.facts["calibration"]
    reason = calibration.get("reason")  # files of earlier versions give none
    if reason:
        return f"the probabilities are not calibrated: {reason}"
    if calibration["fitted"]:
        return ""
    return "the probabilities are not calibrated"


def ask_every_checkpoint(image: Image.Image | None) -> str:
    """Return the answer of every checkpoint for an image, as a table in HTML."""
    if image is None:
        return "<p>First give an image.</p>"
    rows = []
    for title in MODELS:
        model = load_classifier(title)
        found = model.answer(image)
        best = found.top(1)[0]
        share = f"{100 * found.probabilities[best]:.1f} %"
        if calibration_flaw(model):
            share += ", not calibrated"
        # Names of classes and runs are anybody's text, and must not become part of the page.
        cells = map(html.escape, (title, model.facts["names"][best], share))
        rows.append("<tr><td>" + "</td><td>".join(cells) + "</td></tr>")
    head = "<tr><th>weights<th>answer<th>probability</tr>"
    return f"<table class=learn><caption>{CAPTION}</caption>{head}{''.join(rows)}</table>"


def has_heat_map() -> bool:
    """Return True if the first weights can tell where in an image they found a class."""
    blank = Image.new("RGB", (8, 8))
    heat = load_classifier(ABOUT["choices"][0]).answer(blank).heat
    # With a map of a single place, the model could look nowhere else.
    return heat is not None and heat.size > 1


def build_page() -> gr.Blocks:
    """Lay out the page, and connect its parts."""
    title = ABOUT["title"]
    sweep = (SWEEP_SECONDS, KEPT_SECONDS)
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=sweep) as blocks:
        gr.Markdown(f"# {title}\n\n{ABOUT['what']}")
        with gr.Row():
            # The left side asks.
            with gr.Column():
                photo = Photo(
                    label="Image",
                    type="filepath",
                    image_mode=None,
                    sources=["upload", "clipboard", "webcam"],
                    height=HEIGHT,
                )
                chosen = gr.Radio(ABOUT["choices"], value=ABOUT["choices"][0], label="Weights")
                examples = sorted(map(str, (HERE / "examples").glob("*")))
                if examples:
                    gr.Examples(
                        examples,
                        photo,
                        cache_examples=False,
                        label="Images of the validation, never trained on",
                    )
            # The right side answers.
            with gr.Column():
                label = gr.Label(label="Answer", num_top_classes=TOP)
                note = gr.Markdown()
                heat = gr.Image(
                    label="Where it looked",
                    interactive=False,
                    buttons=[],
                    height=HEIGHT,
                    visible=has_heat_map(),
                )
        gr.on([photo.change, chosen.change], answer, [photo, chosen], [label, heat, note], **QUIET)

        # The two kinds of weights of one step are no history: the button needs more.
        if len(MODELS) > 2:
            button = gr.Button("Watch it learn: ask every checkpoint")
            table = gr.HTML()
            button.click(ask_every_checkpoint, photo, table, **QUIET)
            photo.change(lambda: "", None, table, **QUIET)
        gr.Markdown(ABOUT["footer"])
    return blocks


if __name__ == "__main__":
    # Two answers at a time, and 64 visitors who wait: more are told that the page is busy.
    page = build_page().queue(default_concurrency_limit=2, max_size=64)
    page.launch(
        max_file_size=MOST_BYTES,
        css=CSS,
        theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        enable_monitoring=False,
        run_history=False,
        ssr_mode=False,
        footer_links=[],
    )
