"""The live page, built with Gradio: upload an image, see its reconstructions, change its features, refine."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Iterator, Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from PIL import Image

from afterimage.config import AfterimageError
from afterimage.data.decode import load_image, resize_to_cover
from afterimage.experiments.live import HEATMAP_MAX, LiveDecoder, LiveView
from afterimage.experiments.live_state import CHANGES, OWN, LiveState, examples
from afterimage.runs.results import METRICS

STEPS = (8, 64, 200)
"""Minimum, default and maximum number of passes of a refinement."""
THUMBNAIL = 96
"""Side of an example's thumbnail in pixels."""
UPLOAD_LIFETIME_SECONDS = 3600
"""Seconds after which uploaded files are deleted; also the interval of the check."""
WAITING = (
    "<p>The images come here. If they do not, many visitors wait: choose an image again in a moment.</p>"
)
"""HTML shown until the first reconstructions arrive; it stays if the queue was full."""
CHANGE_LABELS = dict(
    zip(CHANGES, ("as they are", "zero", "the second image's", "average of both"), strict=True)
)
FONTS = ("ui-sans-serif", "system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
MONO = ("ui-monospace", "Menlo", "Consolas", "Liberation Mono", "monospace")

TEMPLATES = Path(__file__).with_name("templates")


class LivePage:
    """The live page of a list of decoders.

    Args:
        decoders: the decoders, in the order in which they are shown
    """

    def __init__(self, decoders: Sequence[LiveDecoder]) -> None:
        self.decoders = list(decoders)
        self.names = list(examples())
        self.fields = [field.name for field in dataclasses.fields(LiveState)]

    def build(self) -> gr.Blocks:
        """Build the page as Gradio blocks; `serve` opens it."""
        with gr.Blocks(
            title="afterimage",
            analytics_enabled=False,
            delete_cache=(UPLOAD_LIFETIME_SECONDS, UPLOAD_LIFETIME_SECONDS),
        ) as page:
            gr.HTML(
                "<h1>What is left of your image?</h1><p>Each image was rebuilt from the features of one layer and "
                "nothing else. Images stay on the machine that serves this page, and are deleted after an hour.</p>",
                elem_id="head",
            )
            with gr.Row():
                with gr.Column(scale=1, min_width=300):
                    pick = _image_picker("Your image", "image")
                    with gr.Accordion("Send less of the features", open=True):
                        sliders = {name: _slider(name) for name in ("noise", "bits", "top", "pca")}
                    with gr.Accordion("Change chosen values", open=False):
                        change = gr.Radio(
                            [(label, name) for name, label in CHANGE_LABELS.items()],
                            value=LiveState.change,
                            label="Chosen values become",
                            elem_id="change",
                        )
                        most = max(spec.channels for decoder in self.decoders for spec in decoder.specs) - 1
                        sliders["channel"] = _slider("channel", maximum=most)
                        for name in ("left", "right", "top_edge", "bottom"):
                            sliders[name] = _slider(name)
                        other = _image_picker("Second image", "second")
                with gr.Column(scale=3, min_width=320):
                    cards = gr.HTML(WAITING, elem_id="cards")
                    with gr.Row(elem_id="refining"):
                        labels = [(f"{one.title} · {one.label}", i) for i, one in enumerate(self.decoders)]
                        which = gr.Dropdown(
                            labels, value=0, label="Refine the reconstruction of", elem_id="which"
                        )
                        least, usual, most = STEPS
                        steps = gr.Slider(least, most, usual, step=8, label="Passes", elem_id="steps")
                        start = gr.Button("Refine", variant="primary", elem_id="refine", min_width=110)
                        stop = gr.Button("Stop", elem_id="stop", min_width=80)
                    refined = gr.HTML(elem_id="refined")
                    link = gr.Textbox(
                        label="Link to this view (an image of your own is not in it)",
                        interactive=False,
                        buttons=["copy"],
                        elem_id="link",
                    )
            query = gr.Textbox(visible=False)
            message = gr.State("")
            controls = {"image": pick.name, "second": other.name, "change": change, **sliders}
            settings = [controls[name] for name in self.fields]
            given = [message, pick.upload, other.upload, *settings]
            # One event at a time of each kind; a refinement waits for slider updates, not the other way round.
            alone: dict[str, Any] = {"concurrency_limit": 1, "api_visibility": "private"}

            # Gradio streams only generator functions, and a method that tests wrap in type checks is none.
            def refine(*given: Any) -> Iterator[str]:
                yield from self._refine(*given)

            refining = start.click(
                refine,
                [which, steps, *given[1:]],
                refined,
                trigger_mode="once",
                show_progress="minimal",
                concurrency_id="refining",
                **alone,
            )
            stop.click(None, cancels=[refining], api_visibility="private")
            show = {"fn": self._show, "inputs": given, "outputs": [cards, query, message], **alone}
            show["concurrency_id"] = "showing"

            follow_link = (TEMPLATES / "follow.js").read_text(encoding="utf-8")

            def follow(event: Any) -> None:
                event.then(None, query, link, js=follow_link, api_visibility="private")

            for chooser in (pick, other):
                light = {"api_visibility": "private", "show_progress": "hidden"}
                picked = chooser.gallery.select(
                    self._on_example, None, [chooser.name, chooser.upload], **light
                )
                uploaded = chooser.upload.input(self._on_upload, [chooser.upload], chooser.name, **light)
                for event in (picked, uploaded):
                    follow(event.then(**show, cancels=[refining], show_progress="minimal"))
            moved = [slider.input for slider in sliders.values()]
            follow(
                gr.on(
                    [*moved, change.input],
                    **show,
                    cancels=[refining],
                    trigger_mode="always_last",
                    show_progress="hidden",
                )
            )
            opened = page.load(
                self._open, None, [message, *settings], api_visibility="private", show_progress="hidden"
            )
            follow(opened.then(**show, show_progress="minimal"))
        return page

    def serve(self, *, host: str, port: int, max_waiting: int, max_megabytes: int) -> tuple[gr.Blocks, str]:
        """Open the page on this machine and return without blocking.

        Args:
            host: address to listen at
            port: port to listen at
            max_waiting: number of requests that may wait; later ones get the message that the queue is full
            max_megabytes: largest size of an uploaded file, in megabytes

        Returns:
            the page, whose `close` ends it, and its address

        Raises:
            AfterimageError: the port cannot be opened
        """
        page = self.build()
        page.queue(max_size=max_waiting, default_concurrency_limit=8)
        fonts, css = {"font": FONTS, "font_mono": MONO}, (TEMPLATES / "live.css").read_text(encoding="utf-8")
        try:
            _, address, _ = page.launch(
                server_name=host, server_port=port, theme=gr.themes.Default(primary_hue="blue", **fonts), css=css,
                max_file_size=max_megabytes * 10**6, prevent_thread_lock=True, quiet=True, share=False, inline=False,
                ssr_mode=False, pwa=False, mcp_server=False, enable_monitoring=False, run_history=False,
                footer_links=[], show_error=True, strict_cors=True,
            )  # fmt: skip
        except OSError as error:
            raise AfterimageError(f"cannot serve at {host}:{port}: {error}") from None
        return page, address

    def _open(self, request: gr.Request) -> list[Any]:
        """Return an error message (empty if there is none) and the settings in a link, or else the defaults."""
        try:
            state, problem = LiveState.from_query(dict(request.query_params)), ""
        except AfterimageError as error:
            state, problem = LiveState(), f"The link could not be read: {error}"
        if OWN in (state.image, state.second):
            problem = "The link was made with an image of its maker's own, which it does not hold: bring one yourself."
            own = [name for name in ("image", "second") if getattr(state, name) == OWN]
            state = dataclasses.replace(state, **{name: getattr(LiveState, name) for name in own})
        return [problem, *dataclasses.asdict(state).values()]

    def _on_example(self, event: gr.SelectData) -> tuple[str, None]:
        return self.names[event.index], None

    def _on_upload(self, upload: str | None) -> str:
        return OWN if upload else LiveState.image

    def _show(self, message: str, *given: Any) -> tuple[Any, Any, str]:
        try:
            asked = self._asked(*given)
            views = [decoder.show(*asked) for decoder in self.decoders]
        except AfterimageError as error:
            return _message(str(error)), gr.skip(), ""
        return _message(message) + cards_html(views, asked[0]), asked[0].query(), ""

    def _refine(self, which: int, steps: int, *given: Any) -> Iterator[str]:
        try:
            decoder, asked = self.decoders[int(which)], self._asked(*given)
            before, steps = None, int(min(max(steps, 1), STEPS[-1]))
            for step, view in decoder.refine(*asked, steps=steps):
                before = before or view
                yield refined_html(before, view, step, steps)
        except AfterimageError as error:
            yield _message(str(error))

    def _asked(self, first: str | None, second: str | None, *values: Any) -> tuple[LiveState, Path, Path]:
        """Return the visitor's settings and the files of both images, from the uploads and the controls' values."""
        state = LiveState(**dict(zip(self.fields, values, strict=True)))
        return state, _file(state.image, first), _file(state.second, second)


class _ImagePicker(NamedTuple):
    """Components to choose an image: an upload area, a gallery of examples, and the name of the chosen image."""

    upload: gr.Image
    gallery: gr.Gallery
    name: gr.State


def _image_picker(label: str, name: str) -> _ImagePicker:
    upload = gr.Image(
        label=label,
        sources=["upload", "webcam", "clipboard"],
        height=220,
        buttons=[],
        elem_id=f"upload-{name}",
        interactive=True,
    )
    # Pass on the path of the unopened file: `LiveDecoder` opens it, with its own limits and error messages.
    upload.preprocess = lambda payload: payload and payload.path
    gallery = gr.Gallery(
        [resize_to_cover(load_image(path), THUMBNAIL) for path in examples().values()],
        label="Or one of these",
        columns=4,
        height="auto",
        object_fit="cover",
        allow_preview=False,
        interactive=False,
        buttons=[],
        elem_id=f"examples-{name}",
    )
    return _ImagePicker(upload, gallery, gr.State(getattr(LiveState, name)))


def _slider(name: str, *, maximum: int | None = None) -> gr.Slider:
    field = LiveState.__dataclass_fields__[name]
    low, high = field.metadata["range"]
    step = 0.05 if isinstance(field.default, float) else 1
    high = high if maximum is None else maximum
    return gr.Slider(low, high, field.default, step=step, label=field.metadata["what"], elem_id=name)


def _file(name: str, upload: str | None) -> Path:
    if name != OWN:
        return examples()[name]
    if not upload:
        raise AfterimageError("there is no image yet: drop one, or choose an example")
    return Path(upload)


def _message(text: str) -> str:
    return f'<p class="message" role="alert">{escape(text)}</p>' if text else ""


def _png(pixels: np.ndarray) -> str:
    """Return an image as a `data:` address."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["png"] = _png
    return environment.get_template("live.html")


def cards_html(views: Sequence[LiveView], state: LiveState) -> str:
    """Return HTML with a card for the original and one for each decoder's view."""
    region = {"left": state.left, "top": state.top_edge}
    region |= {"width": max(0, state.right - state.left), "height": max(0, state.bottom - state.top_edge)}
    whole = region == {"left": 0, "top": 0, "width": 100, "height": 100}
    box = None if state.change == "none" or whole else region
    return _template().render(views=views, box=box, heat=100 * HEATMAP_MAX, refined=None, metrics=METRICS)


def refined_html(decoded: LiveView, refined: LiveView, step: int, steps: int) -> str:
    """Return HTML with cards for the decoder's reconstruction, the refined image so far, and the original."""
    views = {"decoded": decoded, "refined": refined, "step": step, "steps": steps}
    return _template().render(**views, metrics=METRICS)
