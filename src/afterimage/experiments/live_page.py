"""The live page, built with Gradio: upload an image, see its reconstructions, change its features, refine."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import numpy as np
from PIL import Image

from afterimage.config import AfterimageError
from afterimage.data.decode import cover, load_image
from afterimage.experiments.live import HEAT, LiveDecoder, LiveView
from afterimage.experiments.live_state import CHANGES, OWN, LiveState, examples
from afterimage.runs.results import METRICS

STEPS = (8, 64, 200)
"""Minimum, default and maximum number of passes of a refinement."""
THUMBNAIL = 96
"""Side of an example's thumbnail in pixels."""
UPLOADS = 3600
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

CSS = """
.gradio-container { max-width: 1500px !important; margin: 0 auto !important; }
#head h1 { margin: 0; font-size: 1.6rem; }
#head p, .cards p, #refined p { margin: 0.2rem 0 0; opacity: 0.75; line-height: 1.4; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 230px), 1fr)); gap: 16px; }
.cards figure { margin: 0; padding: 12px; border: 1px solid var(--border-color-primary); border-radius: 12px;
  background: var(--background-fill-secondary); min-width: 0; }
.cards img { display: block; width: 100%; border-radius: 6px; }
.cards figcaption { overflow-wrap: anywhere; font-weight: 600; line-height: 1.3; padding-bottom: 8px; }
.cards figcaption small { display: block; font-weight: 400; opacity: 0.7; }
.maps { display: grid; grid-template-columns: 1fr 1fr; gap: 8px; padding-top: 8px; }
.maps span { display: block; font-size: 0.75rem; opacity: 0.75; padding-top: 2px; }
.scores { display: flex; flex-wrap: wrap; gap: 2px 12px; margin: 8px 0 0; }
.scores div { min-width: 0; } .scores dt { font-size: 0.72rem; opacity: 0.75; }
.scores dd { margin: 0; font-size: 1rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.cards .note { font-size: 0.75rem; }
.message { padding: 10px 14px; margin-bottom: 12px !important; border-radius: 8px;
  border: 1px solid var(--error-border-color); background: var(--error-background-fill); }
#examples-image .grid-wrap, #examples-second .grid-wrap { height: auto; min-height: 0; padding-top: 28px; }
#examples-image .grid-container, #examples-second .grid-container { grid-template-columns: repeat(4, minmax(0, 1fr));
  height: auto; }
#refining { align-items: end; }
@media (max-width: 640px) { .cards { grid-template-columns: 1fr 1fr; gap: 8px; } .cards figure { padding: 8px; }
  .scores dd { font-size: 0.95rem; } .maps span { display: none; } }
"""
# JavaScript: put the settings into the address bar and return the whole link; Gradio's own parameters (`__theme`) stay.
FOLLOW = """(query) => {
  const url = new URL(window.location), mine = new URLSearchParams(query);
  for (const [key, value] of url.searchParams) if (key.startsWith("__")) mine.append(key, value);
  url.search = mine;
  window.history.replaceState(null, "", url);
  return url.href;
}"""


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
        with gr.Blocks(title="afterimage", analytics_enabled=False, delete_cache=(UPLOADS, UPLOADS)) as page:
            gr.HTML(
                "<h1>What is left of your image?</h1><p>Each image was rebuilt from the features of one layer and "
                "nothing else. Images stay on the machine that serves this page, and are deleted after an hour.</p>",
                elem_id="head",
            )
            with gr.Row():
                with gr.Column(scale=1, min_width=300):
                    pick = _pick("Your image", "image")
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
                        other = _pick("Second image", "second")
                with gr.Column(scale=3, min_width=320):
                    cards = gr.HTML(WAITING, elem_id="cards")
                    with gr.Row(elem_id="refining"):
                        labels = [(f"{one.title} · {one.label}", i) for i, one in enumerate(self.decoders)]
                        which = gr.Dropdown(labels, value=0, label="Refine the answer of", elem_id="which")
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

            def follow(event: Any) -> None:
                event.then(None, query, link, js=FOLLOW, api_visibility="private")

            for chooser in (pick, other):
                light = {"api_visibility": "private", "show_progress": "hidden"}
                chosen = chooser.gallery.select(self._choose, None, [chooser.name, chooser.upload], **light)
                brought = chooser.upload.input(self._bring, [chooser.upload], chooser.name, **light)
                for event in (chosen, brought):
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
        fonts = {"font": FONTS, "font_mono": MONO}
        try:
            _, address, _ = page.launch(
                server_name=host, server_port=port, theme=gr.themes.Default(primary_hue="blue", **fonts), css=CSS,
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

    def _choose(self, event: gr.SelectData) -> tuple[str, None]:
        return self.names[event.index], None

    def _bring(self, upload: str | None) -> str:
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


class _Pick(NamedTuple):
    """Components to choose an image: an upload area, a gallery of examples, and the name of the chosen image."""

    upload: gr.Image
    gallery: gr.Gallery
    name: gr.State


def _pick(label: str, name: str) -> _Pick:
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
        [cover(load_image(path), THUMBNAIL) for path in examples().values()],
        label="Or one of these",
        columns=4,
        height="auto",
        object_fit="cover",
        allow_preview=False,
        interactive=False,
        buttons=[],
        elem_id=f"examples-{name}",
    )
    return _Pick(upload, gallery, gr.State(getattr(LiveState, name)))


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


def _img(pixels: np.ndarray, text: str) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{escape(text, quote=True)}" src="data:image/png;base64,{data}">'


def _scores(view: LiveView) -> str:
    parts = []
    for name, value in view.scores.items():
        metric = METRICS[name]
        title = f"LPIPS ({view.lpips.net})" if name == "lpips" else metric.title
        shown = "unavailable" if value is None else f"{value:.{2 if name == 'psnr' else 3}f}{metric.unit}"
        parts.append(f"<div><dt>{title}</dt><dd>{shown}</dd></div>")
    missing = "" if view.lpips.available else f'<p class="note">{escape(view.lpips.reason)}</p>'
    return f'<dl class="scores">{"".join(parts)}</dl>{missing}'


def _card(title: str, below: str, body: str) -> str:
    return f"<figure><figcaption>{escape(title)}<small>{escape(below)}</small></figcaption>{body}</figure>"


def _map(pixels: np.ndarray, text: str) -> str:
    return f"<div>{_img(pixels, text)}<span>{escape(text)}</span></div>"


def cards_html(views: Sequence[LiveView], state: LiveState) -> str:
    """Return HTML with a card for the original and one for each decoder's view."""
    whole = (state.left, state.top_edge, state.right, state.bottom) == (0, 0, 100, 100)
    box = "" if state.change == "none" or whole else _box(state)
    first = f'<div style="position:relative">{_img(views[0].original, "The original")}{box}</div>'
    scale = f"Below each reconstruction its error, from black to yellow at {100 * HEAT:g} % of the range."
    parts = [_card("Original", "as the encoders see it", f'{first}<p class="note">{scale}</p>')]
    for view in views:
        maps = _map(view.error, "error")
        if view.held is not None:
            maps += _map(view.held, "what the change did")
        notes = "".join(f'<p class="note">{escape(note)}</p>' for note in view.notes)
        body = f'{_img(view.image, f"Rebuilt from {view.label}")}{_scores(view)}<div class="maps">{maps}</div>{notes}'
        parts.append(_card(view.title, view.label, body))
    return f'<div class="cards">{"".join(parts)}</div>'


def _box(state: LiveState) -> str:
    width, height = max(0, state.right - state.left), max(0, state.bottom - state.top_edge)
    place = f"left:{state.left}%;top:{state.top_edge}%;width:{width}%;height:{height}%"
    return f'<div style="position:absolute;{place};outline:2px solid #fff;box-shadow:0 0 0 4px #000"></div>'


def refined_html(decoded: LiveView, refined: LiveView, step: int, steps: int) -> str:
    """Return HTML with cards for the decoder's reconstruction, the refined image so far, and the original."""
    before = _img(decoded.image, "The decoder's answer") + _scores(decoded)
    after = _img(refined.image, f"After pass {step}") + _scores(refined)
    parts = [
        _card(decoded.title, "the decoder's answer", before),
        _card("Refined", f"pass {step} of {steps}", after),
        _card("Original", "as the encoder sees it", _img(refined.original, "The original")),
    ]
    return f'<div class="cards">{"".join(parts)}</div>'
