"""A page on which anyone tries an image. `app.json` beside this file says what it is of; models/ holds the ONNX files.

Nothing that a visitor sends is kept: files lie in a folder of their own, go after minutes, and all of them with the process.
Nobody is told of visits.
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
    """End at the first signal: at none, or broken off by a second, what visitors sent would stay."""
    for number in ENDS:
        signal.signal(number, signal.SIG_IGN)
    sys.exit(0)


for each in ENDS:
    signal.signal(each, leave)
os.environ |= {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_TEMP_DIR": VISITORS.name,
    "HF_HUB_DISABLE_TELEMETRY": "1",
}

import gradio as gr  # noqa: E402  (reads the environment)
from classifier import MOST_BYTES, Classifier, Refused, opened  # noqa: E402
from PIL import Image  # noqa: E402

HERE = Path(__file__).parent
ABOUT: dict[str, Any] = json.loads((HERE / "app.json").read_text())
MODELS = {title: HERE / "models" / name for title, name in ABOUT["models"].items()}
KEPT_SECONDS = 300
CAPTION = "Only the probabilities of the weights that can be chosen above are calibrated, where that could be."
TOP = 5
CSS = "footer {display: none} .learn td, .learn th {padding: .2em .8em; text-align: left}"


class Photo(gr.Image):
    """An image as it came. gr.Image itself would open a file before anything of it is known."""

    is_template = True

    def preprocess(self, payload: Any) -> Image.Image | None:
        if payload is None:
            return None
        try:
            if not payload.path:
                raise Refused("This is no file.")
            path = Path(payload.path)
            if (size := path.stat().st_size) > MOST_BYTES:
                raise Refused(
                    f"This file has {size >> 20} MB; at most {MOST_BYTES >> 20} MB are taken."
                )
            return opened(path.read_bytes())
        except Refused as error:
            raise gr.Error(str(error), print_exception=False) from error
        except OSError as error:
            raise gr.Error(
                "This file is not there any more: send it again.", print_exception=False
            ) from error


@functools.cache
def classifier(title: str) -> Classifier:
    return Classifier(MODELS[title])


def answer(
    image: Image.Image | None, title: str
) -> tuple[dict[str, float] | None, Image.Image | None, str]:
    if image is None:
        return None, None, ""
    started = time.perf_counter()
    model = classifier(title)
    found, names = model.answer(image), model.facts["names"]
    shares = {names[label]: float(found.probabilities[label]) for label in found.top(TOP)}
    heat = None if found.heat is None else model.shown(image, found.heat)
    took = 1000 * (time.perf_counter() - started)
    sure = max(shares.values()) >= model.facts["sure"]
    lines = [
        "" if sure else "**Not sure:** likelier wrong than right.",
        f"{took:.0f} ms, of which {1000 * found.seconds:.0f} ms in the model",
        _uncalibrated(model),
    ]
    return shares, heat, " · ".join(line for line in lines if line)


def _uncalibrated(model: Classifier) -> str:
    """That the model's probabilities are not calibrated, and why; empty where they are."""
    calibration = model.facts["calibration"]
    if reason := calibration.get("reason"):  # files of earlier versions give none
        return f"the probabilities are not calibrated: {reason}"
    return "" if calibration["fitted"] else "the probabilities are not calibrated"


def learned(image: Image.Image | None) -> str:
    """The answer of every checkpoint, as a table."""
    if image is None:
        return "<p>First give an image.</p>"
    rows = []
    for title in MODELS:
        model = classifier(title)
        found = model.answer(image)
        best = found.top(1)[0]
        share = f"{100 * found.probabilities[best]:.1f} %"
        cells = (
            title,
            model.facts["names"][best],
            f"{share}, not calibrated" if _uncalibrated(model) else share,
        )
        rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    return f"<table class=learn><caption>{CAPTION}</caption><tr><th>weights<th>answer<th>probability</tr>{''.join(rows)}</table>"


def page() -> gr.Blocks:
    examples = [str(path) for path in sorted((HERE / "examples").glob("*"))]
    with gr.Blocks(
        title=ABOUT["title"], analytics_enabled=False, delete_cache=(60, KEPT_SECONDS)
    ) as blocks:
        gr.Markdown(f"# {ABOUT['title']}\n\n{ABOUT['what']}")
        with gr.Row():
            with gr.Column():
                photo = Photo(
                    label="Image",
                    type="filepath",
                    image_mode=None,
                    sources=["upload", "clipboard", "webcam"],
                    height=320,
                )
                chosen = gr.Radio(ABOUT["choices"], value=ABOUT["choices"][0], label="Weights")
                if examples:
                    gr.Examples(
                        examples,
                        photo,
                        cache_examples=False,
                        label="Images of the validation, never trained on",
                    )
            with gr.Column():
                label = gr.Label(label="Answer", num_top_classes=TOP)
                note = gr.Markdown()
                tried = classifier(ABOUT["choices"][0]).answer(Image.new("RGB", (8, 8))).heat
                tells = (
                    tried is not None and tried.size > 1
                )  # of one place, it could look nowhere else
                heat = gr.Image(
                    label="Where it looked",
                    interactive=False,
                    buttons=[],
                    height=320,
                    visible=tells,
                )
        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        gr.on([photo.change, chosen.change], answer, [photo, chosen], [label, heat, note], **quiet)
        if len(MODELS) > 2:
            button, table = gr.Button("Watch it learn: ask every checkpoint"), gr.HTML()
            button.click(learned, photo, table, **quiet)
            photo.change(lambda: "", None, table, **quiet)
        gr.Markdown(ABOUT["footer"])
    return blocks


if __name__ == "__main__":
    page().queue(default_concurrency_limit=2, max_size=64).launch(
        max_file_size=MOST_BYTES,
        css=CSS,
        theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        enable_monitoring=False,
        run_history=False,
        ssr_mode=False,
        footer_links=[],
    )
