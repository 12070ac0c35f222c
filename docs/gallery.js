// Moves the divider of two pictures with the slider above them.
for (const slider of document.querySelectorAll(".before-after input")) {
  slider.oninput = () => slider.parentElement.style.setProperty("--at", slider.value / 100);
  // mdBook turns pages with the arrow keys.
  slider.onkeydown = event => event.stopPropagation();
  slider.oninput();
}
