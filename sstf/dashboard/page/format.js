// Numbers as people read them. None of them is null, undefined or not finite when it comes here; `shown` sees to that.

const plain = (digits) => new Intl.NumberFormat("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const formats = { 0: plain(0), 1: plain(1), 2: plain(2), 3: plain(3) };

export const NONE = "–";
export const fixed = (digits) => (value) => formats[digits].format(value);
export const rate = (value) => formats[value < 10 ? 2 : value < 100 ? 1 : 0].format(value);
export const percent = (value) => formats[1].format(100 * value) + " %";
export const seconds = (value) => value < 1 ? formats[value < 0.1 ? 1 : 0].format(1000 * value) + " ms" : formats[2].format(value) + " s";
export const gib = (value) => formats[2].format(value) + " GiB";
export const small = (value) => value.toPrecision(3);

export const shown = (value, format) => Number.isFinite(value) ? format(value) : NONE;

// 75 -> "1:15", 4000 -> "1:06:40"
export function duration(value) {
  const s = Math.round(value), two = (n) => String(n).padStart(2, "0");
  return s < 3600 ? `${Math.floor(s / 60)}:${two(s % 60)}` : `${Math.floor(s / 3600)}:${two(Math.floor(s / 60) % 60)}:${two(s % 60)}`;
}

const clock = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });
export const time = (value) => clock.format(new Date(1000 * value));
