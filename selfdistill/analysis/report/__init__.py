"""Pages about finished runs, each one HTML file, and their tables.

analysis_page.py, comparison_page.py       the pages
analysis_tables.py, comparison_tables.py   their tables, for the terminal and Markdown, too
charts.py, curves.py, heatmap.py           what pages show
document.py, style.py, text.py             what pages are made of
"""
