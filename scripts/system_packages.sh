#!/bin/sh
# Debian packages that the browser tests use. Never fails: without them those tests are skipped and say so.
missing=""
command -v chromium >/dev/null 2>&1 || command -v chromium-browser >/dev/null 2>&1 || command -v google-chrome >/dev/null 2>&1 || missing="chromium"
[ -n "$(find /usr/share/fonts /usr/local/share/fonts "${HOME:-/nonexistent}/.fonts" -name 'DejaVuSans.ttf' 2>/dev/null | head -n 1)" ] || missing="$missing fonts-dejavu"
[ -n "$missing" ] || exit 0
if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "installing Debian packages: $missing" >&2
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing; } >/dev/null 2>&1 && exit 0
fi
echo "note: not installed: $missing (wanted by the browser tests; on Debian, as root: apt-get install $missing)" >&2
exit 0
