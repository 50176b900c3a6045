// A source's figures as the server sends them: rows [x, value of the first column, ...]. Only the newest rows come;
// `since` null means that all did.

export class Table {
  columns = [];
  rows = [];
  width = 1;

  take({ columns, width, since, first, rows }) {
    this.columns = columns;
    this.width = width;
    this.rows = since === null ? rows : this.rows.filter((row) => row[0] < since && row[0] >= first).concat(rows);
  }

  names(prefix) {
    return this.columns.filter((name) => name.startsWith(prefix)).sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
  }

  // [x, values] for uPlot. Where rows are missing for long - an engine was down - a null breaks the line.
  column(name) {
    const at = this.columns.indexOf(name) + 1, xs = [], values = [];
    for (const row of this.rows) {
      const before = xs[xs.length - 1];
      if (xs.length && row[0] - before > 5 * this.width) {
        xs.push(before + this.width);
        values.push(null);
      }
      xs.push(row[0]);
      values.push(at ? row[at] ?? null : null);
    }
    return [xs, values];
  }

  // Of figures that come at some steps only: no null in between.
  sparse(name) {
    const at = this.columns.indexOf(name) + 1, rows = this.rows.filter((row) => at && Number.isFinite(row[at]));
    return [rows.map((row) => row[0]), rows.map((row) => row[at])];
  }
}
