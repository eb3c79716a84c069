package composetest

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"gopkg.in/yaml.v3"

	"trireme.dev/shared/sched/autoscale"
)

// service is a part of an entry of compose.yaml.
type service struct {
	Image       string
	Restart     string
	ReadOnly    bool     `yaml:"read_only"`
	CapDrop     []string `yaml:"cap_drop"`
	MemLimit    string   `yaml:"mem_limit"`
	SecurityOpt []string `yaml:"security_opt"`
	Ports       []string
	Environment map[string]string
	Healthcheck *struct{ Test []string }
}

func readYAML(t *testing.T, path string, into any) {
	t.Helper()
	data, err := os.ReadFile(root + "/" + path)
	if err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal(data, into); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
}

func services(t *testing.T) map[string]service {
	t.Helper()
	var file struct{ Services map[string]service }
	readYAML(t, "compose.yaml", &file)
	if len(file.Services) < 6 {
		t.Fatalf("compose.yaml has %d services", len(file.Services))
	}
	return file.Services
}

// What holds for every container.
func TestEveryServiceIsConfined(t *testing.T) {
	secret := regexp.MustCompile(`(?i)password|secret|token|api_?key`)
	for name, s := range services(t) {
		if s.Restart != "unless-stopped" || !s.ReadOnly || !slices.Contains(s.CapDrop, "ALL") || s.MemLimit == "" ||
			!slices.Contains(s.SecurityOpt, "no-new-privileges:true") {
			t.Errorf("%s lacks a restart policy, a read-only root, dropped capabilities or a memory limit: %+v", name, s)
		}
		if s.Healthcheck == nil {
			t.Errorf("%s has no health check", name)
		}
		for _, p := range s.Ports {
			if !strings.HasPrefix(p, "127.0.0.1:") {
				t.Errorf("%s publishes %s beyond this machine", name, p)
			}
		}
		for key := range s.Environment {
			if secret.MatchString(key) {
				t.Errorf("%s is given %s", name, key)
			}
		}
		if !strings.Contains(s.Image, ":") || strings.HasSuffix(s.Image, ":latest") {
			t.Errorf("image %q of %s has no version", s.Image, name)
		}
	}
}

// Prometheus scrapes every service that is made of the image.
func TestEveryServiceIsScraped(t *testing.T) {
	var config struct {
		ScrapeConfigs []struct {
			JobName string                     `yaml:"job_name"`
			DNS     []struct{ Names []string } `yaml:"dns_sd_configs"`
		} `yaml:"scrape_configs"`
	}
	readYAML(t, "deploy/prometheus/prometheus.yml", &config)
	scraped := map[string]bool{}
	for _, c := range config.ScrapeConfigs {
		for _, d := range c.DNS {
			for _, n := range d.Names {
				scraped[n] = true
			}
		}
	}
	for name, s := range services(t) {
		if want := strings.HasPrefix(s.Image, "trireme:"); scraped[name] != want {
			t.Errorf("%s: scraped %v, want %v", name, scraped[name], want)
		}
	}
}

// The policy that the scaler's container gets can be used.
func TestScalerPolicy(t *testing.T) {
	data, err := os.ReadFile(root + "/deploy/scaler/scaler.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := autoscale.Parse(data); err != nil {
		t.Error(err)
	}
}
