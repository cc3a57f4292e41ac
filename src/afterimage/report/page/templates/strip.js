// The strip of thumbnails: a list box in which the arrow keys, Home and End pick the picture.
function setUpStrip() {
  const strip = byId("strip");
  const options = PICTURES.map((picture, index) => el(
    "button",
    {
      type: "button", role: "option", "aria-label": `Picture ${index + 1}: ${picture.id}`, title: picture.id, tabindex: -1,
      onclick: () => update({ picture: index }),
    },
    el("img", { src: picture.thumbnail, alt: "", width: 56, height: 56, loading: "lazy", draggable: "false" }),
  ));
  strip.append(...options);

  const STEPS = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity };
  strip.addEventListener("keydown", (event) => {
    if (!(event.key in STEPS) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    event.stopPropagation();
    stepPicture(STEPS[event.key]);
    options[state.picture].focus();
  });

  const mark = () => {
    options.forEach((option, index) => {
      option.setAttribute("aria-selected", String(index === state.picture));
      option.tabIndex = index === state.picture ? 0 : -1;
    });
    const { offsetLeft, offsetWidth } = options[state.picture];
    strip.scrollTo({ left: offsetLeft - (strip.clientWidth - offsetWidth) / 2 });
  };
  subscribe(["picture"], mark);
  mark();
}
