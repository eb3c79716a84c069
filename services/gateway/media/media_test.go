package media

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"trireme.dev/shared/leaktest"
)

func TestMain(m *testing.M) { leaktest.VerifyTestMain(m) }

func TestDataURLs(t *testing.T) {
	f := New(Config{MaxBytes: 1000})
	raw := []byte{0xff, 0xfe, 0, 1, 2}
	padded := base64.StdEncoding.EncodeToString(raw)
	for _, test := range []struct {
		name, url string
		want      []byte
		err       error
	}{
		{"plain", "data:image/png;base64," + padded, raw, nil},
		{"no type", "data:;base64," + padded, raw, nil},
		{"upper case", "DATA:image/png;BASE64," + padded, raw, nil},
		{"parameters", "data:image/png;name=x;base64," + padded, raw, nil},
		{"unpadded", "data:image/png;base64," + strings.TrimRight(padded, "="), raw, nil},
		{"escaped", "data:image/png;base64," + strings.ReplaceAll(padded, "=", "%3D"), raw, nil},
		{"line breaks", "data:image/png;base64," + padded[:4] + "\r\n" + padded[4:], raw, nil},
		{"no comma", "data:image/png;base64", nil, ErrURL},
		{"not base64", "data:image/png;base64,%%%", nil, ErrURL},
		{"text", "data:text/plain,hello", nil, ErrURL},
		{"words", "data:image/png;base64,this is no base64!", nil, ErrURL},
		{"large", "data:image/png;base64," + base64.StdEncoding.EncodeToString(make([]byte, 1001)), nil, ErrTooLarge},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := f.Get(t.Context(), test.url)
			if !errors.Is(err, test.err) || !bytes.Equal(got, test.want) {
				t.Errorf("got %x, %v", got, err)
			}
		})
	}
}

func TestAddressesThatAreRefused(t *testing.T) {
	f := New(Config{Timeout: time.Minute})
	brief := New(Config{Timeout: 2 * time.Second})
	for _, test := range []struct {
		url string
		err error
	}{
		{"file:///etc/passwd", ErrURL},
		{"ftp://example.com/x.png", ErrURL},
		{"gopher://127.0.0.1:70/x", ErrURL},
		{"//example.com/x.png", ErrURL},
		{"x.png", ErrURL},
		{"", ErrURL},
		{"http://", ErrURL},
		{"http://%zz/", ErrURL},
		{"http://127.0.0.1/x.png", ErrAddress},
		{"http://127.1/x.png", ErrAddress},
		{"http://0.0.0.0/x.png", ErrAddress},
		{"http://localhost/x.png", ErrAddress},
		{"http://[::1]/x.png", ErrAddress},
		{"http://[::ffff:127.0.0.1]/x.png", ErrAddress},
		{"http://[64:ff9b::7f00:1]/x.png", ErrAddress},
		{"http://10.1.2.3/x.png", ErrAddress},
		{"http://172.16.0.1/x.png", ErrAddress},
		{"http://192.168.1.1/x.png", ErrAddress},
		{"http://100.64.0.1/x.png", ErrAddress},
		{"http://169.254.169.254/latest/meta-data/", ErrAddress},
		{"http://[fe80::1]/x.png", ErrAddress},
		{"http://[fd00:ec2::254]/x.png", ErrAddress},
		{"http://224.0.0.1/x.png", ErrAddress},
		{"http://127.0.0.1:6379/x.png", ErrAddress},
		{"http://8.8.8.8:22/x.png", ErrAddress},
	} {
		get, want := f.Get, test.err
		if test.url == "http://127.1/x.png" { // a resolver may not know the short form, or not answer
			get = brief.Get
		}
		_, err := get(t.Context(), test.url)
		if test.url == "http://127.1/x.png" && errors.Is(err, ErrFetch) {
			want = ErrFetch
		}
		if !errors.Is(err, want) {
			t.Errorf("%s: got %v, want %v", test.url, err, want)
		}
	}
}

// serve starts a server on loopback and returns its URL and host:port.
func serve(t *testing.T, h http.HandlerFunc) (url, host string) {
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return s.URL, s.Listener.Addr().String()
}

func TestFetch(t *testing.T) {
	body := bytes.Repeat([]byte("x"), 1000)
	release := make(chan struct{})
	url, host := serve(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/ok":
			w.Write(body)
		case "/redirect":
			http.Redirect(w, r, "/ok", http.StatusFound)
		case "/loop":
			http.Redirect(w, r, "/loop", http.StatusFound)
		case "/file":
			http.Redirect(w, r, "file:///etc/passwd", http.StatusFound)
		case "/large":
			w.Write(append(body, 'x'))
		case "/chunked":
			for range 3 {
				w.Write(body)
				w.(http.Flusher).Flush()
			}
		case "/slow":
			w.WriteHeader(http.StatusOK)
			w.(http.Flusher).Flush()
			select {
			case <-r.Context().Done():
			case <-release:
			}
		default:
			http.NotFound(w, r)
		}
	})
	defer close(release)
	f := New(Config{MaxBytes: 1000, AllowHosts: []string{host}, Timeout: time.Minute})
	brief := New(Config{MaxBytes: 1000, AllowHosts: []string{host}, Timeout: 300 * time.Millisecond})
	for path, want := range map[string]error{
		"/ok": nil, "/redirect": nil, "/loop": ErrFetch, "/file": ErrURL, "/large": ErrTooLarge, "/chunked": ErrTooLarge,
		"/slow": ErrFetch, "/missing": ErrFetch,
	} {
		get := f.Get
		if path == "/slow" {
			get = brief.Get
		}
		got, err := get(t.Context(), url+path)
		if !errors.Is(err, want) || (want == nil && !bytes.Equal(got, body)) {
			t.Errorf("%s: got %d bytes, %v; want %v", path, len(got), err, want)
		}
		if err != nil && strings.Contains(err.Error(), host) {
			t.Errorf("%s: the error tells an address: %v", path, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := f.Get(ctx, url+"/ok"); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// TestRedirectToLoopback starts at a host that is allowed and is sent on to one that is not.
func TestRedirectToLoopback(t *testing.T) {
	reached := false
	secret, _ := serve(t, func(http.ResponseWriter, *http.Request) { reached = true })
	for _, target := range []string{secret, "http://169.254.169.254/latest/", "http://[::1]:80/"} {
		url, host := serve(t, func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, target, http.StatusFound) })
		f := New(Config{AllowHosts: []string{host}, Timeout: time.Minute})
		if _, err := f.Get(t.Context(), url); !errors.Is(err, ErrAddress) {
			t.Errorf("redirect to %s: %v", target, err)
		}
	}
	if reached {
		t.Error("the address behind the redirect was reached")
	}
}

// TestProxyFromEnvironmentIsNotUsed sets a proxy that would accept everything.
func TestProxyFromEnvironmentIsNotUsed(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	t.Setenv("HTTP_PROXY", "http://"+l.Addr().String())
	t.Setenv("http_proxy", "http://"+l.Addr().String())
	if _, err := New(Config{}).Get(t.Context(), "http://10.0.0.1/"); !errors.Is(err, ErrAddress) {
		t.Errorf("got %v", err)
	}
}

func TestCheckHost(t *testing.T) {
	for host, fine := range map[string]bool{
		"example.com": true, "example.com:8080": true, "a_b-c": true, "127.0.0.1": true, "127.0.0.1:80": true, "::1": true,
		"[::1]:80": true, "xn--bcher-kva.example": true,
		"": false, ":::": false, ":80": false, "host:": false, "host:0": false, "host:65536": false, "host:http": false,
		"[::1]": false, "http://example.com": false, "example.com/x": false, "a b": false, "b\u00fccher.example": false,
	} {
		if err := CheckHost(host); (err == nil) != fine {
			t.Errorf("%q: %v", host, err)
		}
	}
}
