// Uses the page of compare.py in Chromium, as a person with a mouse, a keyboard or a phone does.
//
//     NODE_PATH=FOLDER/node_modules node compare.js URL [FOLDER FOR SCREENSHOTS]
//
// The first line that fails ends the program.

const assert = require("node:assert");
const {chromium} = require("playwright-core");
const [url, folder] = process.argv.slice(2);
const FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
  "--disable-background-networking", "--disable-component-update", "--disable-sync"];
// Ends a test that has failed.
const LIMIT = 120000;

const errors = [];

async function open(browser, options) {
  const context = await browser.newContext(options);
  const page = await context.newPage();
  page.setDefaultTimeout(LIMIT);
  page.on("console", message => message.type() == "error" && errors.push(message.text()));
  page.on("pageerror", error => errors.push(error.message));
  page.on("request", request => request.url().startsWith(url) || errors.push(request.url()));
  await page.addInitScript(() => {
    const read = (source, x, width, height) => {
      const context = new OffscreenCanvas(width, height).getContext("2d");
      context.drawImage(source, x, 0, width, height, 0, 0, width, height);
      return context.getImageData(0, 0, width, height).data;
    };
    const difference = (a, b) => a.reduce((sum, value, i) => sum + Math.abs(value - b[i]), 0) / a.length;
    const snapshot = () => {
      const video = document.getElementById("video");
      const canvas = new OffscreenCanvas(video.videoWidth, video.videoHeight);
      canvas.getContext("2d").drawImage(video, 0, 0);
      return canvas;
    };
    // Mean difference of the two pictures in a frame of the video.
    window.halves = () => {
      const frame = snapshot(), width = frame.width / 2;
      return difference(read(frame, 0, width, frame.height), read(frame, width, width, frame.height));
    };
    // Mean differences of the canvas from the left picture before x, and from the right one behind.
    window.shown = x => {
      const canvas = document.getElementById("canvas"), {width, height} = canvas;
      draw();
      const frame = snapshot();
      const compare = (offset, from, to) => to > from
        ? difference(read(canvas, from, to - from, height), read(frame, offset + from, to - from, height)) : 0;
      return [compare(0, 0, x), compare(width, x, width)];
    };
  });
  await page.goto(url);
  await page.waitForFunction(() => document.getElementById("canvas").width > 16);
  return page;
}

async function main() {
  const browser = await chromium.launch({executablePath: "/usr/bin/chromium", args: FLAGS, headless: true});
  const page = await open(browser, {viewport: {width: 1280, height: 1000}});
  const divider = page.getByRole("slider", {name: "Divider"});
  const at = async (value, on = divider) => assert.equal(await on.getAttribute("aria-valuenow"), String(value));
  const press = async (locator, ...keys) => {
    for (const key of keys) await locator.press(key);
  };
  const text = (id, pattern) => page.waitForFunction(
    ([id, pattern]) => new RegExp(pattern).test(document.getElementById(id).textContent), [id, pattern]);
  // A new frame may come between two readings.
  const drawn = x => page.waitForFunction(x => shown(x).every(difference => difference < 1), x);
  const screenshot = async (page, name) => folder && page.screenshot({path: `${folder}/${name}.png`, fullPage: true});

  const canvas = await page.evaluate(() => [canvas.width, canvas.height]);
  assert.deepEqual(canvas, [320, 180]);
  await page.waitForFunction(() => halves() > 1);
  console.log("the halves differ by", await page.evaluate(() => halves()));

  const box = await page.locator("#stage").boundingBox();
  await at(50);
  await drawn(160);
  await page.mouse.move(box.x + box.width / 2, box.y + box.height / 2);
  await page.mouse.down();
  await page.mouse.move(box.x + box.width * 0.7, box.y + 20, {steps: 5});
  await page.mouse.move(box.x + box.width * 0.9, box.y + 20, {steps: 5});
  await page.mouse.up();
  await at(90);
  await drawn(288);
  await page.mouse.move(box.x + 10, box.y + 20);
  await at(90);
  console.log("the divider follows the mouse");

  await press(divider, "ArrowLeft", "ArrowLeft");
  await at(88);
  await press(divider, "ArrowRight", "PageDown");
  await at(79);
  await press(divider, "Home", "ArrowLeft");
  await at(0);
  await drawn(0);
  await press(divider, "End");
  await at(100);
  await drawn(320);
  console.log("the divider follows the keyboard");

  for (const model of ["small", "tiny"]) {
    await page.getByLabel("Model").selectOption(model);
    await text("active", `^${model}-x2$`);
  }
  await text("sink", "^160x90$");
  await text("src", "^320x180$");
  await text("fps", "^[0-9.]+$");
  await text("time", "^[0-9.]+ ms$");
  await text("message", "^$");
  console.log("the model changes while the video plays");
  await page.mouse.click(box.x + box.width / 2, box.y + box.height / 2);
  await screenshot(page, "desktop");

  const strength = page.getByLabel("Strength");
  await press(strength, "Home");
  await page.waitForFunction(() => halves() < 0.5);
  const together = await page.evaluate(() => new Promise(done => {
    const seen = [], video = document.getElementById("video");
    const next = () => video.requestVideoFrameCallback(() => {
      seen.push(halves());
      seen.length < 10 ? next() : done(seen);
    });
    next();
  }));
  assert(Math.max(...together) < 0.5, `the halves are of different frames: ${together}`);
  console.log("without the network the halves are equal:", Math.max(...together));
  await press(strength, "End");
  await page.waitForFunction(() => halves() > 1);
  console.log("a dial changes the picture");

  const denoise = page.getByLabel("Denoise", {exact: true});
  const automatic = [page.getByLabel("Automatic denoise"), page.getByLabel("Automatic detail")];
  for (const box of automatic) assert(await box.isChecked());
  await press(denoise, "End");
  assert(!await automatic[0].isChecked());
  assert(await automatic[1].isChecked());
  const state = () => page.evaluate(async () => (await fetch("state")).json());
  while ((await state()).stats.denoise != 1) await page.waitForTimeout(200);
  console.log("denoise is in force");

  await page.close();
  const phone = await open(browser, {viewport: {width: 360, height: 740}, hasTouch: true, isMobile: true});
  assert.equal(await phone.evaluate(() => document.documentElement.scrollWidth), 360);
  const stage = await phone.locator("#stage").boundingBox();
  const touch = await phone.context().newCDPSession(phone);
  const finger = (type, share) => touch.send("Input.dispatchTouchEvent",
    {type, touchPoints: share ? [{x: stage.x + stage.width * share, y: stage.y + 20}] : []});
  await finger("touchStart", 0.5);
  for (const share of [0.45, 0.4, 0.3, 0.25]) await finger("touchMove", share);
  await finger("touchEnd");
  await at(25, phone.getByRole("slider", {name: "Divider"}));
  // The dials are those of all browsers.
  await phone.waitForFunction(() => document.querySelector("[name=denoise]").value == 1);
  await screenshot(phone, "phone");
  console.log("the page fits a phone and follows a finger");

  await browser.close();
  assert.deepEqual(errors, []);
}

main().catch(error => {
  console.error(error);
  process.exit(1);
});
