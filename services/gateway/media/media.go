// Package media gets the bytes of the pictures that a request names by URL: data: URLs, and http: and https: URLs of
// hosts on the public internet. It does not look into the bytes (shared/imageprep does).
//
// A URL comes from whoever sends a request, so fetching one must not reach what only this machine can reach: loopback,
// private, link-local, metadata and other special addresses are refused at the moment of dialling, after name
// resolution and for every redirect, and no proxy from the environment is used.
package media

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"code.dny.dev/ssrf"
)

// Errors of Get. All of them are the client's to mend.
var (
	// ErrURL is returned for a URL that cannot be used: another scheme, malformed, not base64.
	ErrURL = errors.New("unusable picture URL")
	// ErrAddress is returned when a URL, or a redirect from it, leads to an address that must not be reached.
	ErrAddress = errors.New("picture URL leads to an address that is not allowed")
	// ErrFetch is returned when the other side cannot be reached or does not answer with a picture in time.
	ErrFetch = errors.New("picture cannot be fetched")
	// ErrTooLarge is returned for a picture of more bytes than allowed.
	ErrTooLarge = errors.New("picture has too many bytes")
)

// Config bounds what is fetched.
type Config struct {
	MaxBytes     int64         // of one picture; 0 means 32 MiB
	Timeout      time.Duration // of one fetch, redirects included; 0 means 10 s
	MaxRedirects int           // 0 means 3; below 0 none
	AllowHosts   []string      // "host" or "host:port" as URLs write it: dialled whatever their address
}

// CheckHost returns an error if host is nothing that Config.AllowHosts can hold: it would match no URL.
func CheckHost(host string) error {
	name := host
	if _, err := netip.ParseAddr(host); err != nil && strings.Contains(host, ":") {
		var port string
		if name, port, err = net.SplitHostPort(host); err != nil {
			return fmt.Errorf("media host %q is not like host or host:port", host)
		}
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
			return fmt.Errorf("media host %q has no port of 1 to 65535", host)
		}
	}
	if _, err := netip.ParseAddr(name); err == nil {
		return nil
	}
	if name == "" || strings.ContainsFunc(name, func(r rune) bool {
		return r != '-' && r != '.' && r != '_' && (r < '0' || r > '9') && (r < 'a' || r > 'z') && (r < 'A' || r > 'Z')
	}) {
		return fmt.Errorf("media host %q is no host name and no IP address", host)
	}
	return nil
}

// Fetcher gets pictures. It is safe for concurrent use.
type Fetcher struct {
	cfg    Config
	client *http.Client
}

// New makes a Fetcher.
func New(cfg Config) *Fetcher {
	if cfg.MaxBytes == 0 {
		cfg.MaxBytes = 32 << 20
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = 10 * time.Second
	}
	if cfg.MaxRedirects == 0 {
		cfg.MaxRedirects = 3
	}
	f := &Fetcher{cfg: cfg}
	free := &net.Dialer{Timeout: cfg.Timeout}
	guarded := &net.Dialer{Timeout: cfg.Timeout, Control: ssrf.New().Safe}
	f.client = &http.Client{
		Transport: &http.Transport{
			Proxy: nil, // a proxy would dial for us, past the guard
			DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
				if f.allowed(address) {
					return free.DialContext(ctx, network, address)
				}
				return guarded.DialContext(ctx, network, address)
			},
			TLSHandshakeTimeout:    cfg.Timeout,
			MaxResponseHeaderBytes: 64 << 10,
			DisableKeepAlives:      true, // a kept connection would be used again without dialling
			ForceAttemptHTTP2:      true,
		},
		CheckRedirect: func(r *http.Request, via []*http.Request) error {
			if len(via) > max(0, cfg.MaxRedirects) {
				return fmt.Errorf("more than %d redirects: %w", max(0, cfg.MaxRedirects), ErrFetch)
			}
			return checkURL(r.URL)
		},
	}
	return f
}

// allowed reports whether the operator lets everyone fetch from this host and port.
func (f *Fetcher) allowed(address string) bool {
	host, _, err := net.SplitHostPort(address)
	return err == nil && (slices.Contains(f.cfg.AllowHosts, address) || slices.Contains(f.cfg.AllowHosts, host))
}

// Get returns the bytes of the picture at rawURL; they are the caller's. The error wraps one of the package's errors, or
// ctx's.
func (f *Fetcher) Get(ctx context.Context, rawURL string) ([]byte, error) {
	if rest, ok := cutPrefixFold(rawURL, "data:"); ok {
		return f.data(rest)
	}
	u, err := url.Parse(rawURL)
	if err != nil {
		return nil, fmt.Errorf("%w: it does not parse", ErrURL)
	}
	if err := checkURL(u); err != nil {
		return nil, err
	}
	timed, cancel := context.WithTimeout(ctx, f.cfg.Timeout)
	defer cancel()
	data, err := f.fetch(timed, u)
	if err != nil && ctx.Err() != nil {
		return nil, fmt.Errorf("fetching a picture: %w", ctx.Err())
	}
	return data, err
}

// IsData reports whether a URL has the picture in itself.
func IsData(rawURL string) bool {
	_, ok := cutPrefixFold(rawURL, "data:")
	return ok
}

func checkURL(u *url.URL) error {
	if u.Scheme != "http" && u.Scheme != "https" {
		return fmt.Errorf("%w: scheme %q, use data, http or https", ErrURL, u.Scheme)
	}
	if u.Host == "" {
		return fmt.Errorf("%w: it has no host", ErrURL)
	}
	return nil
}

func (f *Fetcher) fetch(ctx context.Context, u *url.URL) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrURL, err)
	}
	req.Header.Set("Accept", "image/*")
	req.Header.Set("User-Agent", "trireme")
	resp, err := f.client.Do(req)
	if err != nil {
		return nil, classify(ctx, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%w: the server answered %d", ErrFetch, resp.StatusCode)
	}
	if resp.ContentLength > f.cfg.MaxBytes {
		return nil, f.tooLarge()
	}
	data, err := io.ReadAll(io.LimitReader(resp.Body, f.cfg.MaxBytes+1))
	if err != nil {
		return nil, classify(ctx, err)
	}
	if int64(len(data)) > f.cfg.MaxBytes {
		return nil, f.tooLarge()
	}
	return data, nil
}

func (f *Fetcher) tooLarge() error {
	return fmt.Errorf("%w: more than %d", ErrTooLarge, f.cfg.MaxBytes)
}

// classify makes an error of the HTTP client fit for the one who sent the URL: it says what went wrong without telling
// what addresses there are behind names.
func classify(ctx context.Context, err error) error {
	switch {
	case errors.Is(err, ssrf.ErrProhibitedIP), errors.Is(err, ssrf.ErrProhibitedPort), errors.Is(err, ssrf.ErrProhibitedNetwork):
		return ErrAddress
	case errors.Is(err, ErrURL), errors.Is(err, ErrFetch):
		var u *url.Error
		if errors.As(err, &u) {
			return u.Err
		}
		return err
	case ctx.Err() != nil:
		return fmt.Errorf("%w: it took too long", ErrFetch)
	}
	var dns *net.DNSError
	if errors.As(err, &dns) {
		return fmt.Errorf("%w: its host is unknown", ErrFetch)
	}
	return fmt.Errorf("%w: the connection failed", ErrFetch)
}

// data decodes what follows "data:" (RFC 2397): [media type][;parameter...];base64,DATA.
func (f *Fetcher) data(rest string) ([]byte, error) {
	head, encoded, ok := strings.Cut(rest, ",")
	if !ok {
		return nil, fmt.Errorf("%w: a data URL needs a comma", ErrURL)
	}
	if _, ok := cutSuffixFold(head, ";base64"); !ok {
		return nil, fmt.Errorf("%w: a data URL must say base64", ErrURL)
	}
	if int64(len(encoded)/4*3) > f.cfg.MaxBytes+2 {
		return nil, f.tooLarge()
	}
	if strings.Contains(encoded, "%") {
		if plain, err := url.PathUnescape(encoded); err == nil {
			encoded = plain
		}
	}
	encoding := base64.StdEncoding
	if len(encoded)%4 != 0 && !strings.ContainsAny(encoded, "=\r\n") {
		encoding = base64.RawStdEncoding
	}
	data, err := encoding.DecodeString(encoded)
	if err != nil {
		return nil, fmt.Errorf("%w: the data is not base64", ErrURL)
	}
	if int64(len(data)) > f.cfg.MaxBytes {
		return nil, f.tooLarge()
	}
	return data, nil
}

func cutPrefixFold(s, prefix string) (string, bool) {
	if len(s) < len(prefix) || !strings.EqualFold(s[:len(prefix)], prefix) {
		return s, false
	}
	return s[len(prefix):], true
}

func cutSuffixFold(s, suffix string) (string, bool) {
	if len(s) < len(suffix) || !strings.EqualFold(s[len(s)-len(suffix):], suffix) {
		return s, false
	}
	return s[:len(s)-len(suffix)], true
}
