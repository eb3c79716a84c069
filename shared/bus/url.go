package bus

import (
	"errors"
	"fmt"
	"net/url"
	"regexp"
	"strings"
)

// another is where another server begins in a list of them: one that has a scheme, as a comma may be one of a password that is not escaped.
var another = regexp.MustCompile(`,\s*[A-Za-z][A-Za-z0-9+.-]*://`)

// Redacted is the URL of a NATS server, or those of several with commas between, as logs and errors may have it: without user, password
// or token. It need not be one that can be read. Of servers without a scheme those before the last password are left out, too.
func Redacted(urls string) string {
	var b strings.Builder
	begin := 0
	for _, next := range append(another.FindAllStringIndex(urls, -1), []int{len(urls)}) {
		one := urls[begin:next[0]]
		if at := strings.LastIndexByte(one, '@'); at >= 0 {
			kept := 0
			if scheme := strings.Index(one, "://"); scheme >= 0 && scheme < at {
				kept = scheme + len("://")
			}
			one = one[:kept] + "xxxxx" + one[at:]
		}
		b.WriteString(one)
		begin = next[0]
	}
	return b.String()
}

// errSecret stands for what is wrong with a URL that has a password, or is wrong because of that: an error about it would have some of it.
var errSecret = errors.New("it cannot be read; in a user and password write % as %25, / as %2F, # as %23, ? as %3F, : as %3A, @ as %40 and a comma as %2C")

// ConnectError is what an error of connecting to NATS may say: where, and why, but no password.
func ConnectError(urls string, err error) error {
	if malformed := (*url.Error)(nil); errors.As(err, &malformed) && strings.Contains(urls, "@") {
		err = errSecret
	}
	return fmt.Errorf("connecting to NATS at %s: %w", Redacted(urls), err)
}
