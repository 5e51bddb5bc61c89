"""Pages about finished runs: charts, heat maps, tables, each page one HTML file."""
