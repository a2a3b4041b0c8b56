/** How xterm.js is styled under a policy without `unsafe-inline`.
 *
 * It makes `style` elements and sets `style` attributes, both of which such a policy forbids in a page. It takes
 * another document to make its elements with: the one here has its rules become a constructed style sheet. Spans it
 * makes with the page's own, whatever it was given, so the attribute becomes declarations of the CSSOM for all elements.
 * A policy lets a script do both that it lets run.
 */

const setAttribute = HTMLElement.prototype.setAttribute;

HTMLElement.prototype.setAttribute = function (name: string, value: string): void {
  if (name === "style") this.style.cssText = value;
  else setAttribute.call(this, name, value);
};

export function styledDocument(): { document: Document; dispose: () => void } {
  const sheets = new Set<CSSStyleSheet>();

  function adopt(sheet: CSSStyleSheet, wanted: boolean): void {
    sheets[wanted ? "add" : "delete"](sheet);
    const others = document.adoptedStyleSheets.filter((each) => each !== sheet);
    document.adoptedStyleSheets = wanted ? [...others, sheet] : others;
  }

  /** What stands for a `style` element: its text is a sheet. */
  function style(): HTMLElement {
    const element = document.createElement("span");
    const sheet = new CSSStyleSheet();
    element.hidden = true;
    adopt(sheet, true);
    Object.defineProperty(element, "textContent", { set: (text: string) => sheet.replaceSync(text) });
    element.remove = () => {
      adopt(sheet, false);
      Element.prototype.remove.call(element);
    };
    return element;
  }

  function createElement(name: string): HTMLElement {
    return name === "style" ? style() : document.createElement(name);
  }

  const made = new Proxy(document, {
    get(target, name) {
      if (name === "createElement") return createElement;
      const value: unknown = Reflect.get(target, name, target);
      return typeof value === "function" ? (value as () => unknown).bind(target) : value;
    },
  });
  return { document: made, dispose: () => [...sheets].forEach((sheet) => adopt(sheet, false)) };
}
