// What is wrong with each slide of a deck, all steps shown; run in its page. Returns lines of text.
() => {
  const SMALLEST_TEXT = 20; // pixels
  const SMALLEST_SCALE = 0.75; // of an equation
  const SMALLEST_CONTRAST = 4.5; // of text with its ground, as in WCAG 2, level AA
  const faults = [];

  function outside(box, frame) {
    return box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1 || box.bottom > frame.bottom + 1;
  }

  function overlap(one, other) {
    const across = Math.min(one.right, other.right) - Math.max(one.left, other.left);
    const down = Math.min(one.bottom, other.bottom) - Math.max(one.top, other.top);
    return across > 1 && down > 1;
  }

  function texts(slide) {
    const walker = document.createTreeWalker(slide, NodeFilter.SHOW_TEXT);
    const found = [];
    while (walker.nextNode()) {
      const holder = walker.currentNode.parentElement;
      if (walker.currentNode.data.trim() && !holder.closest("mjx-container, aside")) found.push(walker.currentNode);
    }
    return found;
  }

  function boxOf(node) {
    const range = document.createRange();
    range.selectNodeContents(node);
    return range.getBoundingClientRect();
  }

  function luminance(colour) {
    const parts = colour.match(/[\d.]+/g).slice(0, 3).map((part) => part / 255);
    const [r, g, b] = parts.map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  }

  function ground(element) {
    for (let holder = element; holder; holder = holder.parentElement) {
      const colour = getComputedStyle(holder).backgroundColor;
      if (!/, 0\)$/.test(colour) && colour !== "transparent") return colour;
    }
    return "rgb(255, 255, 255)";
  }

  function contrast(element) {
    const [dark, light] = [luminance(getComputedStyle(element).color), luminance(ground(element))].sort((a, b) => a - b);
    return (light + 0.05) / (dark + 0.05);
  }

  Reveal.getSlides().forEach((section, index) => {
    Reveal.slide(index);
    section.querySelectorAll(".fragment").forEach((step) => step.classList.add("visible"));
    const name = `slide ${index + 1} (${section.querySelector("h1, h2").textContent.trim()})`;
    const fault = (what) => faults.push(`${name}: ${what}`);
    const slide = section.querySelector(".slide");
    const frame = slide.getBoundingClientRect();
    if (Math.abs(frame.width - 1280) > 1 || Math.abs(frame.height - 720) > 1) fault(`is ${frame.width} x ${frame.height}`);
    const content = slide.querySelector(".content").getBoundingClientRect();
    const blocks = [...slide.querySelectorAll(".content p, .content li, .content table, .listing, .equation, .picture")];
    for (const block of blocks) {
      if (outside(block.getBoundingClientRect(), content)) fault(`<${block.className || block.tagName}> leaves its place`);
      if (block.scrollWidth > block.clientWidth + 1 && block.matches(".listing")) fault("code is wider than its box");
    }
    blocks.forEach((one, n) => blocks.slice(n + 1).forEach((other) => {
      if (!one.contains(other) && overlap(one.getBoundingClientRect(), other.getBoundingClientRect())) fault("two parts overlap");
    }));
    for (const text of texts(slide)) {
      const size = parseFloat(getComputedStyle(text.parentElement).fontSize);
      if (size < SMALLEST_TEXT) fault(`'${text.data.trim().slice(0, 30)}' has ${size} px`);
      const seen = contrast(text.parentElement);
      if (seen < SMALLEST_CONTRAST) fault(`'${text.data.trim().slice(0, 30)}' has a contrast of ${seen.toFixed(1)}`);
      if (outside(boxOf(text), frame)) fault(`'${text.data.trim().slice(0, 30)}' leaves the slide`);
    }
    for (const formula of slide.querySelectorAll("mjx-container svg")) {
      const holder = formula.closest(".content, h1, h2, footer").getBoundingClientRect();
      if (outside(formula.getBoundingClientRect(), holder)) fault("a formula leaves its place");
    }
    for (const equation of slide.querySelectorAll(".equation")) {
      const number = equation.querySelector(".number");
      if (number && outside(number.getBoundingClientRect(), content)) fault("an equation's number leaves its place");
      if (Number(equation.dataset.scale) < SMALLEST_SCALE) fault(`equation scaled to ${equation.dataset.scale}`);
    }
    for (const image of slide.querySelectorAll("img")) {
      if (!image.complete || !image.naturalWidth) fault("a picture is not shown");
      if (image.getBoundingClientRect().height < 100) fault("a picture is too small");
      if (!image.alt) fault("a picture has no description");
    }
    if (section.querySelector("[data-mjx-error]")) fault("mathematics that MathJax refuses");
  });
  return faults;
}
