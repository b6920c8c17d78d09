// Tells where a picture beside it was clicked. Pictures stay plain images: without this part they are only not clickable.

const listening = new WeakMap();

export default function ({ data, parentElement, setTriggerValue }) {
  const around = parentElement.closest(`[class*="st-key-${data.around}"]`);
  if (!around) return;
  const tell = (event) => {
    const images = [...around.querySelectorAll('[data-testid="stImage"] img')];
    const number = images.indexOf(event.target);
    if (number < 0) return;
    const box = event.target.getBoundingClientRect();
    setTriggerValue("at", {
      picture: number,
      x: ((event.clientX - box.left) / box.width) * event.target.naturalWidth,
      y: ((event.clientY - box.top) / box.height) * event.target.naturalHeight,
    });
  };
  // This function runs again with every message; only one listener may stay.
  const before = listening.get(around);
  if (before) around.removeEventListener("click", before);
  listening.set(around, tell);
  around.addEventListener("click", tell);
  return () => {
    around.removeEventListener("click", tell);
    if (listening.get(around) === tell) listening.delete(around);
  };
}
