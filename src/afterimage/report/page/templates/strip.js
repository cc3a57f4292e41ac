// The strip of thumbnails: a list box in which the arrow keys, Home and End pick the image.
function setUpStrip() {
  const strip = byId("strip");
  const options = IMAGES.map((image, index) => el(
    "button",
    {
      type: "button", role: "option", "aria-label": `Image ${index + 1}: ${image.id}`, title: image.id, tabindex: -1,
      onclick: () => update({ image: index }),
    },
    el("img", { src: image.thumbnail, alt: "", width: 56, height: 56, loading: "lazy", draggable: "false" }),
  ));
  strip.append(...options);

  const STEPS = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity };
  strip.addEventListener("keydown", (event) => {
    if (!(event.key in STEPS) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    event.stopPropagation();
    stepImage(STEPS[event.key]);
    options[state.image].focus();
  });

  const mark = () => {
    options.forEach((option, index) => {
      option.setAttribute("aria-selected", String(index === state.image));
      option.tabIndex = index === state.image ? 0 : -1;
    });
    const { offsetLeft, offsetWidth } = options[state.image];
    strip.scrollTo({ left: offsetLeft - (strip.clientWidth - offsetWidth) / 2 });
  };
  subscribe(["image"], mark);
  mark();
}
