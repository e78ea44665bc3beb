"use strict";
const tip = document.getElementById("tip");
document.addEventListener("pointermove", (event) => {
  const mark = event.target instanceof Element ? event.target.closest("[data-tip]") : null;
  tip.hidden = mark === null;
  if (mark === null) return;
  tip.textContent = mark.getAttribute("data-tip");
  const right = event.clientX + 16 + tip.offsetWidth > window.innerWidth;
  const low = event.clientY + 16 + tip.offsetHeight > window.innerHeight;
  tip.style.left = `${Math.max(4, right ? event.clientX - 12 - tip.offsetWidth : event.clientX + 16)}px`;
  tip.style.top = `${Math.max(4, low ? event.clientY - 12 - tip.offsetHeight : event.clientY + 16)}px`;
});
document.addEventListener("pointerleave", () => { tip.hidden = true; });
