#!/bin/sh
# Chromium for the tests of the page, on a CI machine of Debian's kind that has none. Elsewhere a person decides what is
# installed; without a browser those tests are skipped, and say so.
for name in chromium chromium-browser google-chrome; do
    command -v "$name" >/dev/null 2>&1 && exit 0
done
[ -n "${CI:-}" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1 || exit 0
echo "Installing Chromium for the tests of the page ..."
install="timeout 300 apt-get install -y -qq --no-install-recommends chromium"
export DEBIAN_FRONTEND=noninteractive
{ $install || { timeout 120 apt-get update -qq && $install; }; } >/dev/null 2>&1 ||
    echo "Chromium could not be installed: the tests of the page will be skipped"
