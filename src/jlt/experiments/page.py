"""The page of `jlt app`: Gradio's fields around jlt.experiments.play.

One wish is worked on at a time and a few may wait; a visitor's answer goes to that visitor alone. The page asks no
other host for anything: no analytics, no fonts from elsewhere.
"""

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jlt.data.hub import find_checkpoint
from jlt.evaluation.records import Figure
from jlt.experiments.play import EACH, Limits, Wish, check_alike, drawings, labels, sheet, solvers, watch_all
from jlt.extras import needed
from jlt.nn import checkpoint
from jlt.sampling import Generator, Making, default_scale, load

WAITING = 8  # wishes; one more is told to come again


def build(runs: Mapping[str, Path], limits: Limits, figures: Mapping[str, Figure], device: str = "cpu") -> Any:
    """Return the page, gradio.Blocks, for runs by name; runs that do not fit each other are a ValueError."""
    with needed("the page", "app"):
        import gradio as gr

    @functools.lru_cache(maxsize=8)
    def open_model(run: str, weights: str) -> Generator:
        return load(runs[run], weights, device)

    runs = {run: find_checkpoint(path) for run, path in runs.items()}
    decays = [checkpoint.read(path).decays for path in runs.values()]
    shared = [f"{decay:g}" for decay in decays[0] if all(decay in others for others in decays)]
    choices = [*(["ema"] if all(decays) else []), "model", *shared]
    opened = {run: open_model(run, choices[0]) for run in runs}
    check_alike(opened)
    first = next(iter(opened.values()))

    def sample(*fields: Any) -> Iterator[tuple[Any, ...]]:
        try:
            for views in watch_all(open_model, list(runs), Wish(*fields), limits):
                pictures = []
                for run in runs:
                    view = views.get(run)
                    pictures += [None if view is None else sheet(view)]
                    pictures += [None if view is None else view.strip]
                yield (*pictures, f"{sum(view.share for view in views.values()) / len(runs):.0%}")
        except (ValueError, FloatingPointError) as error:
            raise gr.Error(" ".join(str(error).split()), print_exception=False) from None

    with gr.Blocks(title="jlt", analytics_enabled=False, delete_cache=(600, 600)) as blocks:
        gr.Markdown("# " + " and ".join(f"{generator.header['name']}" for generator in opened.values()))
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                with gr.Row():
                    start = gr.Button("Sample", variant="primary", elem_id="sample", min_width=80)
                    stop = gr.Button("Stop", elem_id="stop", min_width=80)
                label = gr.Dropdown(labels(first), value=EACH, label="class")
                with gr.Row():
                    num_images = gr.Number(8, label="images", precision=0, min_width=80, elem_id="images")
                    seed = gr.Number(0, label="seed", precision=0, min_width=80, elem_id="seed")
                with gr.Row():
                    solver = gr.Dropdown(solvers(limits), value=Making.solver, label="solver", min_width=80)
                    steps = gr.Number(Making.steps, label="steps", precision=0, min_width=80, elem_id="steps")
                scale = gr.Number(default_scale(first.model.config.num_classes), label="guidance scale")
                with gr.Row():
                    low = gr.Number(0.1, label="where t is above", min_width=80)
                    high = gr.Number(1.0, label="and below", min_width=80)
                weights = gr.Dropdown(choices, value=choices[0], label="weights")
                progress = gr.Textbox("", label="done", interactive=False, elem_id="done")
            fields = [label, num_images, seed, solver, steps, scale, low, high, weights]
            shown = []
            for run, generator in opened.items():
                with gr.Column(scale=3, min_width=280):
                    gr.Markdown(f"**{run}**: {generator.header['name']}, predicts {generator.target.short}")
                    # no button to share, which sends a picture to another host
                    picture = functools.partial(
                        gr.Image, format="png", interactive=False, show_label=False, buttons=["download", "fullscreen"]
                    )
                    shown.append(picture(label=f"images of {run}", elem_classes="grid"))
                    gr.Markdown("Above z, below the predicted x, by time:")
                    shown.append(picture(label=f"path of {run}"))
        if figures:
            with gr.Accordion("Geometry of the latents", open=False):
                gr.HTML(drawings(figures))
        # no click is overlooked: the button is off until the sampling has ended, which after Stop takes a step more
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "undocumented"}
        start.click(lambda: gr.Button(interactive=False), None, start, **quick)
        # one key for all: sampling is what takes the machine's time, whoever asks
        going = start.click(sample, fields, [*shown, progress], concurrency_limit=1, api_name="sample")
        going.then(lambda: gr.Button(interactive=True), None, start, **quick)  # not called after an error
        going.failure(lambda: (gr.Button(interactive=True), "stopped"), None, [start, progress], **quick)
        stop.click(None, cancels=[going], **quick)
    return blocks.queue(max_size=WAITING, default_concurrency_limit=1)


def serve(blocks: Any, host: str, port: int | None, wait: bool = True) -> str:
    """Serve the page and return its address; with `wait`, until it is interrupted."""
    import gradio as gr

    own = ["system-ui", "sans-serif"]  # the visitor's, or the page would ask another host
    _, address, _ = blocks.launch(
        server_name=host, server_port=port, share=False, prevent_thread_lock=True, quiet=True, ssr_mode=False,
        pwa=False, mcp_server=False, enable_monitoring=False, footer_links=[], max_file_size="1kb", show_error=True,
        theme=gr.themes.Base(font=own, font_mono=["ui-monospace", "monospace"]),
    )  # fmt: skip
    if wait:
        print(address, flush=True)
        blocks.block_thread()
    return str(address)
