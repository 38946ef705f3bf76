"""Pictures: panels, the words on them, and the files that they become; and pages for a browser.

What may change here: how any picture or page looks. What is drawn belongs to the rooms.
"""
