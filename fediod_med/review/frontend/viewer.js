// Three linked planes drawn by NiiVue from the bytes that the page sends. Nothing is fetched but niivue.js beside this file.

const viewers = new WeakMap();
const CROSSHAIR = [240 / 255, 228 / 255, 66 / 255, 1];
const LETTERS = ["RL", "AP", "SI"];

export default function ({ data, parentElement, setTriggerValue }) {
  const host = parentElement.querySelector(".fediod-viewer");
  if (!host) return;
  let viewer = viewers.get(host);
  if (!viewer) {
    viewer = { host, tell: null, queue: Promise.resolve(), niivue: null, image: "", labels: "", header: null };
    viewers.set(host, viewer);
  }
  viewer.tell = setTriggerValue;
  const message = read(data);
  // One message after another; a message that a newer one has overtaken is passed over.
  viewer.newest = message;
  viewer.queue = viewer.queue.then(() => (viewer.newest === message ? show(viewer, message) : undefined)).catch(failed(viewer));
  // May be called before the next message as well as at the end: only what has left the page is given up.
  return () => setTimeout(() => host.isConnected || close(viewer, host), 0);
}

function read(data) {
  const view = new DataView(data.buffer, data.byteOffset, data.byteLength);
  const start = 4 + view.getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(data.subarray(4, start)));
  const middle = start + header.image.bytes;
  return { header, image: data.slice(start, middle), labels: data.slice(middle, middle + header.labels.bytes) };
}

function failed(viewer) {
  return (error) => {
    say(viewer, `The interactive viewer stopped (${error?.message ?? error}). Pictures are shown instead.`);
    viewer.tell("unable", String(error?.message ?? error).slice(0, 200));
  };
}

function say(viewer, words) {
  viewer.host.querySelector("[role=status]").textContent = words;
}

async function show(viewer, { header, image, labels }) {
  if (!viewer.niivue) await open(viewer, header);
  const { NVImage } = viewer.library;
  const niivue = viewer.niivue;
  const { opts } = niivue;
  opts.isRadiologicalConvention = header.radiological || header.synthetic;
  opts.isOrientationTextVisible = !header.synthetic;
  const millimetres = wide(header) / (viewer.host.clientWidth || 900); // of a pixel; a thinner line may not be drawn
  opts.crosshairWidth = header.crosshair ? 1.6 * millimetres : 0;
  opts.crosshairGap = 6 * millimetres;
  niivue.overlayOutlineWidth = header.outline ? 1 : 0;
  viewer.header = header;
  viewer.host.querySelector("canvas").setAttribute("aria-label", header.alt);
  viewer.host.querySelector(".synthetic").hidden = !header.synthetic;
  viewer.host.querySelector(".notice").textContent = header.notice;
  const replaced = viewer.image !== header.image.id;
  if (replaced) {
    while (niivue.volumes.length) niivue.removeVolume(niivue.volumes[0]);
    viewer.labels = "";
    const volume = await NVImage.loadFromUrl({ url: image.buffer, name: "image.nii.gz", cal_min: 0, cal_max: 255 });
    niivue.addVolume(volume);
    viewer.image = header.image.id;
    fit(viewer);
  }
  if (viewer.labels !== header.labels.id) {
    if (niivue.volumes.length > 1) niivue.removeVolume(niivue.volumes[1]);
    if (header.labels.id) {
      const volume = await NVImage.loadFromUrl({ url: labels.buffer, name: "labels.nii.gz", opacity: header.opacity });
      volume.setColormapLabel(colours(header));
      niivue.addVolume(volume);
    }
    viewer.labels = header.labels.id;
  }
  if (niivue.volumes.length > 1) niivue.volumes[1].opacity = header.opacity;
  niivue.updateGLVolume();
  niivue.scene.crosshairPos = header.voxel.map((voxel, axis) => (voxel + 0.5) / header.shape[axis]);
  niivue.drawScene();
  tellPlace(viewer, header.voxel);
  viewer.host.dataset.drawn = `${header.image.id} ${header.labels.id} ${header.voxel.join(",")} ${header.opacity}`;
}

async function open(viewer, header) {
  const canvas = viewer.host.querySelector("canvas");
  if (!document.createElement("canvas").getContext("webgl2")) throw new Error("this browser has no WebGL2");
  say(viewer, "Loading the interactive viewer");
  viewer.library = await import(new URL("./niivue.js", import.meta.url).href);
  const { Niivue, MULTIPLANAR_TYPE, SHOW_RENDER, SLICE_TYPE, DRAG_MODE } = viewer.library;
  viewer.header = header;
  fit(viewer);
  const niivue = new Niivue({
    backColor: [0, 0, 0, 1],
    crosshairColor: CROSSHAIR,
    crosshairWidthUnit: "mm",
    dragAndDropEnabled: false,
    dragMode: DRAG_MODE.pan,
    fontColor: [1, 1, 1, 1],
    fontMinPx: 14,
    forceDevicePixelRatio: 1,
    isForceMouseClickToVoxelCenters: true,
    loadingText: "",
    logLevel: "error",
    multiplanarLayout: MULTIPLANAR_TYPE.ROW,
    multiplanarPadPixels: 4,
    multiplanarShowRender: SHOW_RENDER.NEVER,
    sagittalNoseLeft: true,
    showAllOrientationMarkers: true,
    sliceType: SLICE_TYPE.MULTIPLANAR,
    viewModeHotKey: "",
    clipPlaneHotKey: "",
  });
  await niivue.attachToCanvas(canvas, false);
  viewer.niivue = niivue;
  const moved = () => {
    const voxel = voxelOf(viewer);
    if (voxel.join() === viewer.header.voxel.join()) return;
    viewer.header.voxel = voxel;
    viewer.tell("voxel", voxel);
  };
  niivue.onLocationChange = () => tellPlace(viewer, voxelOf(viewer));
  canvas.addEventListener("mouseup", () => setTimeout(moved, 0));
  canvas.addEventListener("touchend", () => setTimeout(moved, 0));
  let turning = 0;
  canvas.addEventListener("wheel", () => {
    clearTimeout(turning);
    turning = setTimeout(moved, 250);
  });
  canvas.addEventListener("webglcontextlost", () => failed(viewer)(new Error("the graphics context was lost")));
  say(viewer, "");
}

function voxelOf({ niivue, header }) {
  return [0, 1, 2].map((axis) => {
    const at = Math.floor(niivue.scene.crosshairPos[axis] * header.shape[axis]);
    return Math.min(Math.max(at, 0), header.shape[axis] - 1);
  });
}

function tellPlace(viewer, voxel) {
  const { affine, thinned } = viewer.header;
  const mm = [0, 1, 2].map((row) => affine[row][3] + [0, 1, 2].reduce((sum, axis) => sum + affine[row][axis] * voxel[axis], 0));
  const place = mm.map((value, axis) => `${LETTERS[axis][value >= 0 ? 0 : 1]} ${Math.abs(value).toFixed(1)}`).join(" ");
  const coarse = thinned > 1 ? `; every ${thinned}. voxel is drawn` : "";
  viewer.host.querySelector(".place").textContent = `Crosshair at ${place} mm${coarse}`;
}

function colours({ colours }) {
  const parts = (start) => colours.map(({ colour }) => parseInt(colour.slice(start, start + 2), 16));
  return {
    R: [0, ...parts(1)],
    G: [0, ...parts(3)],
    B: [0, ...parts(5)],
    A: [0, ...colours.map(() => 255)],
    I: [0, ...colours.map((_, number) => number + 1)],
    labels: ["", ...colours.map(({ name }) => name)],
  };
}

function extent({ affine, shape }) {
  return [0, 1, 2].map((axis) => Math.hypot(...affine.slice(0, 3).map((row) => row[axis])) * shape[axis]);
}

// Of the three planes side by side.
function wide(header) {
  const size = extent(header);
  return 2 * size[0] + size[1];
}

// The canvas is as high as three planes side by side need, in millimetres as on the slices.
function fit({ host, header }) {
  const size = extent(header);
  host.querySelector(".canvas").style.aspectRatio = `${wide(header)} / ${Math.max(size[1], size[2])}`;
}

function close(viewer, host) {
  viewers.delete(host);
  const { niivue } = viewer;
  if (!niivue) return;
  viewer.niivue = null;
  niivue.cleanup();
  niivue.gl?.getExtension("WEBGL_lose_context")?.loseContext();
}
